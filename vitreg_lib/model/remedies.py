"""Effects of remedies on a model: empty tokens, registers added at test time, registers trained in.

`effect` compares a model with the same model after a remedy, photo by photo. `trial` tries the remedies that need no
training: it chooses on one half of the photos and measures the effects on the other.

    vr.remedies.trial(model, images.x).table        # a row for NAME, NAME+empty4, NAME+ttr4 …
    vr.remedies.effect(model, vr.load("file:runs/…/model.safetensors"), images, search.cutoff, search.layer)
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..base import UserError
from ..hooks.anatomy import dissect
from ..hooks.capture import evaluating, hooks
from . import mend
from .model import Model

NAN = float("nan")
BETTER = 0.01  # shares of outliers that differ by less than this part of the first share count as equal
MEANS = ("outliers", "attention_on_outliers", "attention_on_registers", "answers_kl", "same_answer", "features_apart")
DOSES = (0, 1, 4, 8)  # registers at test time; 0 silences the neurons and adds none
RANDOM = "random neurons"  # a control
VIEWS, REACH = 10, 3  # of `shift_average`: views, the first unshifted; largest shift of the others in patches
SHIFTED = f"mean of {VIEWS} shifted views"


@dataclass(frozen=True)
class Outputs:
    """What is compared of one model: norms (images, patches) after a block and attention of cls there, NaN without cls,
    on patches and on registers (images, patches or registers); log probabilities (images, classes), None without
    classes; features (images, dim); patches (images, patches, dim) after the final LayerNorm; norms of registers
    (images, registers)."""

    norms: torch.Tensor
    attention: torch.Tensor
    on_registers: torch.Tensor
    answers: torch.Tensor | None
    features: torch.Tensor
    patches: torch.Tensor
    registers: torch.Tensor


def outputs_of(model, images, layer: int = -1) -> Outputs:
    """The `Outputs` of a `Model` on normalised images or an `Images` set, in one forward pass."""
    has_cls = model.anatomy.has_cls
    keep = ("norms", "final", "attention") if has_cls else ("norms", "final")
    captured = model.capture(images, keep, layers=layer, queries=[0] if has_cls else None)
    row = captured.attention[captured.layers[-1]][:, :, 0].mean(1).float() if has_cls else captured.norms[:, -1] * NAN
    features, answers = captured.final[:, 0] if has_cls else captured.patches(captured.final).mean(1), None
    if hasattr(model.module, "forward_head"):  # timm's
        with evaluating(model.module):
            final = captured.final.to(model.weights)
            features = model.module.forward_head(final, pre_logits=True).float().cpu()
            logits = model.module.forward_head(final).float().cpu()
        if model.module.num_classes > 0 and logits.ndim == 2:
            answers = logits.log_softmax(1)
    pooled = features if features.ndim == 2 else features.mean(1)
    norms, patches = captured.patch_norms[:, -1], captured.patches(captured.final)
    on_patches, on_registers = captured.patches(row), row[:, captured.registers]
    return Outputs(norms, on_patches, on_registers, answers, pooled, patches, captured.register_norms[:, -1])


def effect(model, remedied, images, cutoff: float, layer: int = -1, labels: torch.Tensor | None = None):
    """A DataFrame of differences between two models of the same architecture, or their `Outputs`; one row per photo.

    outliers, outliers_before: share of patch tokens above `cutoff` after block `layer`. attention_on_outliers,
    …_before: attention of cls in that block (mean over heads) on the positions of outliers in `model`; NaN without
    outliers. attention_on_registers: on all registers of `remedied`, of any kind. answers_kl: Kullback-Leibler
    divergence of the class probabilities, in nats; same_answer: whether the likeliest class stays; both NaN for a model
    without classes. features_apart: 1 - cosine of the pooled features. right, right_before: whether the likeliest class
    is that of `labels` (images,); NaN without labels. Attention is NaN for a model without cls.
    """
    import pandas as pd

    before, after = (m if isinstance(m, Outputs) else outputs_of(m, images, layer) for m in (model, remedied))
    mask = before.norms > cutoff
    nothing = torch.full((len(mask),), NAN)
    first, last = before.answers, after.answers
    named, registers = first is not None, after.on_registers
    labelled = named and labels is not None
    columns = {
        "outliers_before": mask.float().mean(1),
        "outliers": (after.norms > cutoff).float().mean(1),
        "attention_on_outliers_before": _attention_on(before, mask),
        "attention_on_outliers": _attention_on(after, mask),
        "attention_on_registers": registers.sum(1) if registers.shape[1] else nothing,
        "features_apart": 1 - F.cosine_similarity(before.features, after.features, dim=1),
        "answers_kl": F.kl_div(last, first, reduction="none", log_target=True).sum(1) if named else nothing,
        "same_answer": (first.argmax(1) == last.argmax(1)).float() if named else nothing,
        "right_before": (first.argmax(1) == labels).float() if labelled else nothing,
        "right": (last.argmax(1) == labels).float() if labelled else nothing,
    }
    return pd.DataFrame({name: values.double().numpy() for name, values in columns.items()})


@dataclass(frozen=True)
class Trial:
    """Effects of the remedies that need no training.

    search: the neurons, searched on the first half of the images. chosen_on: a DataFrame with the columns outliers and
    features_apart of `effect` in that half, a row per remedy, the original model first, then the simplest remedies.
    table: a DataFrame with a row per remedy or control, from the second half alone: the means of `effect`;
    patches_apart, 1 - cosine of the patch tokens, after the final LayerNorm, that were no outliers; largest_norm of a
    patch token; register_norm. norms: {name: (images, patches)} of the second half.
    """

    search: mend.Search
    chosen_on: object
    table: object
    norms: dict[str, torch.Tensor]


def trial(
    model: Model, x: torch.Tensor, cutoff=None, counts=DOSES, empty: int = 4, labels=None, progress: bool = False
) -> Trial:
    """The `Trial` of a model on normalised images, of `counts` registers at test time and `empty` tokens of zeros.

    cutoff: see `mend.find`. labels: (images,) for the columns of right answers. Four rows are scored and never chosen.
    Two are controls: +ttr0, which only silences neurons, and as many random neurons as `find` gives. Two are remedies:
    +minus1, and the mean over shifted views (`shift_average`), which no file can hold: it costs ten forward passes an
    image and mends the patch tokens alone.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    if len(x) < 2:
        raise UserError("at least two images are needed: one to choose a remedy on, one to try it on")
    half, own = len(x) // 2, model.label
    first, second = x[:half], x[half:]
    search = mend.find(model, first, cutoff=cutoff)
    at_first, before = (outputs_of(model, part, search.layer) for part in (first, second))
    labels = None if labels is None else labels[half:]
    chosen_on = {own: effect(at_first, at_first, first, search.cutoff)}
    rows, norms = {own: _row(before, before, search.cutoff, labels)}, {own: before.norms}
    made = _remedied(model, first, search, counts, empty)
    for remedied in tqdm(made, "remedies", unit="", disable=not progress, leave=False):
        name, after = remedied.label, outputs_of(remedied, second, search.layer)
        rows[name], norms[name] = _row(before, after, search.cutoff, labels), after.norms
        if name not in (RANDOM, f"{own}+minus1", f"{own}+ttr0"):
            chosen_on[name] = effect(at_first, remedied, first, search.cutoff, search.layer)
    after = _shifted(model, second, before, search.layer)
    rows[SHIFTED], norms[SHIFTED] = _row(before, after, search.cutoff, labels), after.norms
    chosen_on = {name: effects[["outliers", "features_apart"]].mean() for name, effects in chosen_on.items()}
    return Trial(search, pd.DataFrame(chosen_on).T, pd.DataFrame.from_dict(rows, orient="index"), norms)


def _row(before: Outputs, after: Outputs, cutoff: float, labels: torch.Tensor | None) -> dict[str, float]:
    """A row of `Trial.table`."""
    apart = (1 - F.cosine_similarity(before.patches, after.patches, dim=2))[before.norms <= cutoff].mean().item()
    more = {"patches_apart": apart, "largest_norm": after.norms.max().item()}
    more["register_norm"] = after.registers.mean().item()  # NaN without any
    measured = effect(before, after, None, cutoff, labels=labels).dropna(axis=1, how="all")
    return {name: float(measured[name].mean()) for name in (*MEANS, "right") if name in measured} | more


def _shifted(model: Model, x: torch.Tensor, before: Outputs, layer: int) -> Outputs:
    """The `Outputs` of the mean over shifted views, whose answers and pooled features are those of the image itself."""
    with evaluating(model.module), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        parts = [shift_average(model.module, part.to(model.weights), layer=layer)[0] for part in x.split(16)]
        final = torch.cat([model.anatomy.norm(tokens.to(model.weights)).float().cpu() for tokens in parts])
    norms = torch.linalg.vector_norm(torch.cat(parts), dim=-1).cpu()
    return dataclasses.replace(before, norms=norms, attention=before.attention * NAN, patches=final)


def _remedied(model: Model, x, search: mend.Search, counts, empty: int) -> Iterator[Model]:
    """The remedied models, made one at a time to save memory; the control is labelled RANDOM."""
    yield mend.with_empty_tokens(model, empty)
    for count in sorted(set(counts)):
        yield mend.with_test_time_registers(model, count, search.neurons)
    if search.onset + 1 < model.anatomy.depth:
        yield mend.without_directions(model, 1, x, search.onset)
    noise, widths = torch.Generator().manual_seed(0), [linear.in_features for linear in model.anatomy.mlp_out]
    drawn = {(block, int(torch.randint(widths[block], (1,), generator=noise))) for block, _ in search.neurons}
    yield dataclasses.replace(mend.with_test_time_registers(model, 4, sorted(drawn)), label=RANDOM)


def patches_and_answers(module: nn.Module, x: torch.Tensor, layer: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """(patch tokens after a block (images, patches, dim), output of the model) of one forward pass."""
    anatomy, kept = dissect(module), []
    with hooks((anatomy.blocks[layer].register_forward_hook, lambda block, inputs, output: kept.append(output))):
        answers = (module if hasattr(module, "forward_head") else anatomy.forward)(x)
    return anatomy.tokens(kept[0], len(x), anatomy.grid(x))[:, anatomy.num_prefix_tokens :], answers


def shift_average(
    module: nn.Module, x: torch.Tensor, views: int = VIEWS, layer: int = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    """`patches_and_answers` with tokens averaged over views, shifted by whole patches and every second one flipped.

    Each token moves back to the patch that it shows; tokens of the mirrored border do not count. The first view is the
    image itself, which alone gives the answers. Shifts are drawn from torch's random state. PH-Reg (2025) trains
    registers towards this mean.
    """
    anatomy = dissect(module)
    rows, cols = anatomy.grid(x)
    height, width = anatomy.patch_size
    tokens, answers = patches_and_answers(module, x, layer)
    total, count = tokens.float().unflatten(1, (rows, cols)).clone(), torch.ones(rows, cols, 1, device=x.device)
    reach = min(REACH, rows - 1, cols - 1)
    around = F.pad(x, (reach * width, reach * width, reach * height, reach * height), mode="reflect")
    for view in range(1, views):
        down, right = torch.randint(-reach, reach + 1, (2,)).tolist()
        top, left = (reach + down) * height, (reach + right) * width
        shifted = around[..., top : top + x.shape[2], left : left + x.shape[3]]
        captured, _ = patches_and_answers(module, shifted.flip(3) if view % 2 else shifted, layer)
        captured = captured.float().unflatten(1, (rows, cols))
        captured = captured.flip(2) if view % 2 else captured
        # the patch at (r, c) of the view shows (r + down, c + right) of the image
        to_rows, to_cols = _overlap(rows, down), _overlap(cols, right)
        from_rows, from_cols = _overlap(rows, -down), _overlap(cols, -right)
        total[:, to_rows, to_cols] += captured[:, from_rows, from_cols]
        count[to_rows, to_cols] += 1
    return (total / count).flatten(1, 2), answers


def _overlap(length: int, shift: int) -> slice:
    return slice(max(0, shift), length + min(0, shift))


def best(chosen_on) -> str:
    """The name in `Trial.chosen_on` with fewest outliers; among those within 1 % of the share before, the one that
    turns features least, and of equal ones the simplest."""
    outliers = chosen_on.outliers
    fewest = outliers <= outliers.min() + BETTER * outliers.iloc[0]
    return chosen_on.features_apart[fewest].idxmin()


def _attention_on(of: Outputs, mask: torch.Tensor) -> torch.Tensor:
    return (of.attention * mask).sum(1).where(mask.any(1), NAN)
