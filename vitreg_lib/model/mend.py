"""Registers at test time: the neurons that make a trained model's outliers act at added tokens instead.

The method is from Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers". A few MLP neurons are active
at the tokens that become outliers, before these get their large norm (`find`). The mended model has N zero tokens after
cls. At those neurons, they get the largest activation of the image's patches, and the patches get zero
(`add_registers`). N = 0 only silences the neurons at the patches, as a control.

The paper's released code differs. Here every image of a batch is treated, not the first alone; each neuron has its own
maximum; cls neither enters the maximum nor changes; the output drops the new tokens and no patch. The maximum runs over
patches *and* new tokens, which hold the large activations after the first treated block.

    mended = vr.load("vit-ti+ttr4")           # finds the neurons on a handful of images, adds 4 registers
    mended = vr.load("deit-ti+empty4")        # 4 tokens of zeros and nothing else: the simplest remedy, and a control
    mended = vr.load("vit-ti+minus1")         # without the direction in which places differ most
    search = vr.mend.find(model, images)      # the same by hand
    mended = vr.mend.with_test_time_registers(model, 4, search.neurons)
"""

import dataclasses
import hashlib

import torch
from torch import nn

from ..base import UserError, remembered
from ..data import images as image_sets
from ..hooks.anatomy import Anatomy, dissect, layer_scale
from ..hooks.capture import capture
from ..measure.detection import detect
from ..measure.outliers import Outliers, onset_of
from .added import Neurons, add_registers, registers_from, remove_directions
from .names import entries

COUNTS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50)  # how many neurons are tried, fewest first
REMAINING = 0.1  # `find` takes the fewest neurons that leave less than this share of the outliers
MENDED = 0.5  # a model that keeps more than this share of its outliers is not mended


class NothingToMend(UserError):
    """The model has no outliers, or no small set of neurons makes them."""


@dataclasses.dataclass(frozen=True)
class Search:
    """The result of `find`: the neurons, strongest first, and what the search measured.

    layer: the block after which outliers are counted; onset: the first block with outliers; cutoff: a norm.
    share_before, share_after: share of patch tokens above the cutoff after `layer`, in the searched images, without and
    with one register. table: the strongest candidates, the first rows of `rank`.
    """

    neurons: tuple[tuple[int, int], ...]
    layer: int
    onset: int
    cutoff: float
    share_before: float
    share_after: float
    table: object

    @property
    def mends(self) -> bool:
        """Whether moving the neurons removes at least half of the outliers."""
        return self.share_after <= MENDED * self.share_before


def find(model, images=None, max_neurons: int = 50, cutoff: float | Outliers | None = None) -> Search:
    """The MLP neurons that mark a `zoo.Model`'s outlier tokens, searched on `images` (see `handful`).

    Outliers are those of `detection.detect`. A number as `cutoff` replaces them by the tokens of a larger norm after
    the last block; the `Outliers` of other images set both norm and block. Candidates are the neurons of the blocks up
    to the onset, in the order of `rank`. The result is the fewest of the first 1, 2, 3, 5 … `max_neurons` candidates
    that leave less than a tenth of the outliers, or else the number that leaves fewest. Raises NothingToMend (a
    UserError) for a model without outliers.
    """
    x = _pixels(handful(model) if images is None else images)
    layer, onset, cutoff, is_outlier = _where(model, x, cutoff)
    table = rank(model.module, x, is_outlier, range(onset + 1)).head(max(max_neurons, 10))
    ranked = list(zip(table.block, table.neuron, strict=True))
    before, best = is_outlier.float().mean().item(), None
    for count in [c for c in COUNTS if c <= max_neurons]:
        mended = add_registers(model.module, ranked[:count], 1)
        after = (capture(mended, x, layers=layer).patch_norms > cutoff).float().mean().item()
        if best is None or after < best[0]:
            best = (after, count)
        if after < REMAINING * before:
            break
    return Search(tuple(ranked[: best[1]]), layer, onset, cutoff, before, best[0], table.reset_index(drop=True))


def _where(model, x: torch.Tensor, cutoff: float | Outliers | None):
    """(block to look at, the first with outliers, cutoff, mask (images, patches)), by `detect` or by a set cutoff."""
    if cutoff is None:
        detection = detect(model, x)
        outliers = detection.outliers
        if detection.answer == "none" or not outliers.mask.any():
            raise NothingToMend(f"{model.name} has nothing to mend: {detection.reason}")
        return outliers.layer, detection.onset, outliers.cutoff, outliers.mask.flatten(1)
    norms = model.capture(x).patch_norms  # (images, layers, patches)
    layer = norms.shape[1] - 1
    if isinstance(cutoff, Outliers):
        layer, cutoff = cutoff.layer, cutoff.cutoff
    is_outlier = norms[:, layer] > cutoff
    if not is_outlier.any():
        raise NothingToMend(f"{model.name} has nothing to mend: no patch token is above the cutoff {cutoff:g}")
    return layer, onset_of(norms, is_outlier, cutoff, layer), cutoff, is_outlier


def with_empty_tokens(model, n: int):
    """A `zoo.Model` with `n` zero tokens after its prefix tokens and nothing else changed; named NAME+emptyN.

    Outliers that depend on the content of a patch may move to these tokens without training; outliers that depend on
    its position do not.
    """
    about = f"{model.name} with {n} tokens of zeros that nothing was trained for"
    return _remedied(model, add_registers(model.module, (), n), "empty", n, about, ())


def with_test_time_registers(model, n: int, neurons: Neurons | None = None):
    """A `zoo.Model` with `n` registers added at test time; the given model is left as it was.

    `neurons` are by default those of `find` on a few images (`handful`). The name ends in +ttrN, the role is "mended",
    the base is the given model, and the anatomy counts the new registers. Without `neurons`, raises NothingToMend for a
    model that has no outliers or keeps more than half of them, so that +ttrN always has an effect. Raises UserError for
    attention with a bias for each pair of positions, which a new token lacks.
    """
    neurons = _searched_neurons(model) if neurons is None else tuple(neurons)
    which = ", ".join(f"{block}:{neuron}" for block, neuron in neurons[:5]) + (" …" if len(neurons) > 5 else "")
    added, moved = f"{n} register{'s' * (n != 1)}", f"{len(neurons)} neuron{'s' * (len(neurons) != 1)}"
    about = f"{model.name}, {added} added at test time, {moved} moved (block:neuron {which})"
    return _remedied(model, add_registers(model.module, neurons, n), "ttr", n, about, neurons)


def without_directions(model, n: int = 1, images=None, layer: int | None = None):
    """A `zoo.Model` whose patch tokens lose the `n` directions in which places differ most; named NAME+minusN.

    They are the first principal axes of the places' mean tokens after block `layer`, over normalised `images`; by
    default after the block where outliers begin, over a few images (`handful`). Outliers at fixed places lie along
    them. Raises NothingToMend for a model without outliers, and UserError where no block follows.
    """
    x = _pixels(handful(model) if images is None else images)
    layer = _where(model, x, None)[1] if layer is None else layer
    if layer + 1 >= model.anatomy.depth:
        raise UserError(
            f"{model.name}: no block follows block {layer}, so that removed directions would change nothing"
        )
    captured = model.capture(x, "tokens", layers=layer)
    places = captured.patches(captured.tokens[layer]).float().mean(0)
    axes = torch.linalg.svd(places - places.mean(0), full_matrices=False)[2][:n]
    what = f"{n} direction{'s' * (n != 1)} of the patch tokens after block {layer}, in which places differ most"
    removed = remove_directions(model.module, layer + 1, axes)
    return _remedied(model, removed, "minus", n, f"{model.name} without {what}", ())


def with_added(model, kind: str, n: int, neurons: Neurons | None = None):
    """The model NAME+emptyN, NAME+minusN or NAME+ttrN: `with_empty_tokens`, `without_directions`, or by default
    `with_test_time_registers`."""
    if kind == "ttr":
        return with_test_time_registers(model, n, neurons)
    return with_empty_tokens(model, n) if kind == "empty" else without_directions(model, n)


def _remedied(model, module: nn.Module, kind: str, n: int, about: str, neurons: Neurons):
    what = f"{n} {sorted(neurons)}" if kind != "minus" else about  # tokens alone are the same by either name
    return dataclasses.replace(
        model,
        name=f"{model.name}+{kind}{n}",
        label=f"{model.label}+{kind}{n}",
        module=module,
        sha256=hashlib.sha256(f"{model.sha256} {what}".encode()).hexdigest(),
        role="mended",
        base=model.label,
        registers_from="test time" if kind == "ttr" else registers_from(module, model.registers_from),
        about=about,
    )


def _searched_neurons(model) -> tuple[tuple[int, int], ...]:
    """The neurons of `find` on a few images; kept, for many models and notebooks ask for them again."""
    x = handful(model).x

    def searched() -> tuple[tuple[int, int], ...]:
        search = find(model, x)
        if not search.mends:
            raise NothingToMend(
                f"{model.name} cannot be mended this way: moving its {len(search.neurons)} likeliest neurons leaves "
                f"{search.share_after:.2%} of the patch tokens outliers, of {search.share_before:.2%}"
            )
        return search.neurons

    return tuple(map(tuple, remembered(model.fingerprint(x) | {"kind": "neurons"}, searched)))


def handful(model, source: str = "", n: int = 32) -> image_sets.Images:
    """At most `n` images on which neurons are searched: by default a mini ViT's own, else the shipped photos."""
    own = (
        entries().get(model.entry, {}).get("looks_at", "scenes") if hasattr(model.module, "vit_arguments") else "photos"
    )
    return image_sets.load(source or own, model, n, seed=7)


def rank(module: nn.Module, x: torch.Tensor, is_outlier: torch.Tensor, layers):
    """A DataFrame of neurons in `layers`, ranked by how much more norm they add at outliers than at other patches.

    Columns: block, neuron, at_outliers and elsewhere (mean |activation|), writes (their difference x the length of the
    neuron's output weights, LayerScale included). The published ranking uses the activations alone.
    """
    import pandas as pd

    anatomy = dissect(module)
    tables = []
    for layer, means in mean_activations(module, x, is_outlier, layers).items():
        writes = (means[0] - means[1]) * _output_length(anatomy, layer).cpu()
        there, elsewhere, writes = torch.stack([*means, writes]).double().numpy()
        columns = {"neuron": range(len(writes)), "at_outliers": there, "elsewhere": elsewhere, "writes": writes}
        tables.append(pd.DataFrame({"block": layer, **columns}))
    return pd.concat(tables).sort_values("writes", ascending=False, kind="stable")


def mean_activations(module: nn.Module, x: torch.Tensor, is_there: torch.Tensor, layers) -> dict:
    """{block: (2, hidden)}: mean |activation| at the patches where `is_there` (images, patches), and at the others."""
    sums = dict.fromkeys(layers, 0)
    for images, there in zip(x.split(8), is_there.split(8), strict=True):  # a batch's activations are large
        captured = capture(module, images, "mlp", layers=tuple(layers))
        for layer, activations in captured.mlp.items():
            size = captured.patches(activations).abs().float()
            sums[layer] = sums[layer] + torch.stack([size[there].sum(0), size[~there].sum(0)])
    counts = torch.stack([is_there.sum(), (~is_there).sum()]).clamp(min=1)
    return {layer: total / counts[:, None] for layer, total in sums.items()}


def _output_length(anatomy: Anatomy, layer: int) -> torch.Tensor:
    """(hidden,) length of what a neuron of activation 1 adds to the residual stream, LayerScale included."""
    weight = anatomy.mlp_out[layer].weight.detach().float()
    scale = layer_scale(anatomy.blocks[layer], 2)
    return torch.linalg.vector_norm(weight if scale is None else weight * scale.detach()[:, None], dim=0)


def _pixels(images) -> torch.Tensor:
    return getattr(images, "x", images)
