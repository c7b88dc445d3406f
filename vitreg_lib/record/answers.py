"""Five questions about the artifacts of a model, each answered by a sentence, numbers and tables.

`ASKED` are the questions in order; each takes a `Look`. Questions that presuppose artifacts are asked only for models
that have some.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass, field

import torch

from ..base import UserError
from ..data import images as image_sets
from ..hooks.capture import attention_rows, evaluating, hooks
from ..measure import detection, maps, objects, places
from ..measure.pairs import interval
from ..model import mend, remedies
from ..probes import local
from .look import BATCH, SHOWN, Look

PER_CLASS = 5  # images of a class, for five-fold cross-validation
TOKENS = 4000  # for training a local probe
COPIES = 0.99  # from this cosine on, two registers count as copies
SINK = 10.0  # even shares of the attention of other patches


@dataclass
class Answer:
    """answer, in a word or two; sentence, with its number; numbers, None where not measured; tables: DataFrames by
    title. maps of the shown images, by name: (images, rows, cols), or boxes (images, 4) in pixels."""

    answer: str
    sentence: str
    numbers: dict[str, float | int | None] = field(default_factory=dict)
    tables: dict = field(default_factory=dict)
    maps: dict[str, torch.Tensor] = field(default_factory=dict)


def asks(question: str, presupposes: bool = True):
    """A decorator: the function answers this question, which may presuppose artifacts."""

    def asking(function):
        @functools.wraps(function)
        def ask(seen: Look) -> Answer:
            found = seen.detection
            if found.has_artifacts or not presupposes:
                return function(seen)
            return _not_asked(found)

        ask.question = question
        return ask

    return asking


def _not_asked(found: detection.Detection) -> Answer:
    if found.answer == "none":
        return Answer("none to ask about", "Not asked: there are no artifacts.")
    return Answer("undecided", "Not asked: whether there are artifacts is undecided.")


@asks("Are there any?", presupposes=False)
def any_there(seen: Look) -> Answer:
    """Whether there are artifacts: by the detector, with the share of outliers in all images."""
    found, norms = seen.detection, seen.detection.outliers.norms
    numbers = dict(images=len(seen.shares), images_judged=found.images, images_needed=found.images_needed)
    numbers |= dict(blocks=seen.model.anatomy.depth, median_norm=norms.median().item(), largest_norm=norms.max().item())
    numbers |= dict.fromkeys(("outlier_share", "outlier_share_low", "outlier_share_high", "images_with_outliers_high"))
    numbers |= dict(support=found.support, cutoff=None, norm_ratio=None, onset_layer=None)
    if found.answer == "undecided":
        more = (found.images_needed or 0) - found.images
        decide = f" {more} more would decide." if more > 0 else ""
        return Answer("undecided", f"Undecided: {found.reason}.{decide}", numbers)
    if found.answer == "none":
        high = 1 - 0.05 ** (1 / found.images)
        numbers |= dict(outlier_share=0.0, images_with_outliers_high=high)
        text = f"No artifacts: {found.reason}; at 95 %, fewer than {high:.1%} of such images hold any."
        return Answer("none", text, numbers)
    share, (low, high) = seen.shares.mean().item(), interval(seen.shares)
    numbers |= dict(outlier_share=share, outlier_share_low=low, outlier_share_high=high)
    numbers |= dict(cutoff=found.outliers.cutoff, norm_ratio=found.norm_ratio, onset_layer=found.onset)
    text = (
        f"Artifacts, {found.strength}: {share:.2%} of the patch tokens ({low:.2%} to {high:.2%}) are outliers after "
        f"block {found.outliers.layer}, with {found.norm_ratio:.1f} times the median norm; they are so far out from "
        f"block {found.onset} on."
    )
    return Answer("artifacts", text, numbers)


@asks("What kind are they?", presupposes=False)
def kind(seen: Look) -> Answer:
    """Whether artifacts depend on place or content; for any model, also attention sinks and equal registers."""
    found, numbers, tables, parts = seen.detection, {}, {}, []
    if found.has_artifacts:
        parts = _parted(seen, numbers, tables)
    if found.images >= detection.FEWEST:
        parts.append(_sinks(seen, numbers))
    parts.append(_registers(seen, numbers))
    text = " ".join(filter(None, parts))
    return Answer(found.kind or _not_asked(found).answer, text or _not_asked(found).sentence, numbers, tables)


def _parted(seen: Look, numbers: dict, tables: dict) -> list[str]:
    """Sentences on what predicts outliers, and on whether they follow place or content when these are separated."""
    found, x = seen.detection, seen.kept.x[seen.sample]
    numbers["explained_by_place"] = found.place
    parts = [f"{found.kind[0].upper()}{found.kind[1:]}: place explains {found.place:.0%} of where the outliers are."]
    try:
        table = places.tests(seen.model, x, found.outliers.cutoff, layer=found.outliers.layer)
    except ValueError as error:
        return [*parts, f"Not tested by an intervention: {error}."]
    first, grey = table.iloc[0], table.outliers["a grey image"]
    tables[f"Where outliers go when place and content part company, {len(x)} images"] = table
    numbers |= dict(follows_place=first.follows_place, follows_content=first.follows_content, outliers_in_grey=grey)
    return [
        *parts,
        f"With {table.index[0]} among 4 + 4 places, {first.follows_place:.0%} of the outliers follow the place and "
        f"{first.follows_content:.0%} the content; a grey image has {grey:.1f} times as many.",
    ]


def _sinks(seen: Look, numbers: dict) -> str:
    """A sentence on patches of normal norm that receive much attention from others."""
    received = seen.observed.received(seen.detection.outliers.layer).get("patches")
    if received is None:
        return ""
    sink, outlier = received >= SINK, seen.detection.outliers.mask.flatten(1)
    share = sink.float().mean().item()
    usual = (sink & ~outlier).sum().item() / max(sink.sum().item(), 1)
    numbers |= {"sink_share": share, "sinks_of_usual_norm": usual if sink.any() else None}
    if not sink.any():
        return f"No patch is an attention sink ({SINK:.0f} even shares of the other patches' attention)."
    return (
        f"{share:.2%} of the patches are attention sinks ({SINK:.0f} even shares of the other patches' attention or "
        f"more); {usual:.0%} of these have no outlying norm."
    )


def _registers(seen: Look, numbers: dict) -> str:
    """A sentence on whether registers differ; empty for fewer than two."""
    alike, number = detection.registers_alike(seen.model, seen.kept.x[:8]), seen.model.anatomy.num_registers
    numbers["largest_cosine_of_registers"] = alike
    if alike is None:
        return ""
    text = f"At least two of the {number} registers are copies of each other" if alike >= COPIES else ""
    return f"{text or f'The {number} registers differ'} (largest cosine between two {alike:.3f})."


@asks("What do they hold?")
def held(seen: Look) -> Answer:
    """What outliers hold: the class of the image, by one token; pixels and place of their own patch, by probes."""
    numbers, tables, parts = {}, {}, []
    answer = _classified(seen, numbers, tables, parts)
    try:
        probes = _local(seen)
    except ValueError as error:  # too few images
        return Answer(answer, f"{' '.join(parts)} Place and pixels were not probed: {error}.", numbers, tables)
    best = {}
    for what, table in probes.items():
        tables[f"{what[0].upper()}{what[1:]} of a token's own patch, read linearly, {len(seen.kept)} images"] = table
        best |= {(what, group): table.relative.xs(group).min() for group in ("outlier", "matched")}
        numbers |= {f"{what}_error_{group}": best[what, group] for group in ("outlier", "matched")}
    if all(map(math.isfinite, best.values())):
        parts.append(
            "Read linearly off outliers, and off their nearest normal tokens, by the best of three fits: the pixels of "
            f"their own patch with {best['pixels', 'outlier']:.2f} and {best['pixels', 'matched']:.2f} of the error of "
            f"a constant guess, their place with {best['place', 'outlier']:.2f} and {best['place', 'matched']:.2f}."
        )
    else:
        parts.append("Too few outliers for probes of their own patch.")
    return Answer(answer, " ".join(parts), numbers, tables)


def _local(seen: Look) -> dict:
    """{"pixels", "place": table}: ridge regression of a patch's pixels, and of its row and column, by group and fit."""
    n, rows, cols = seen.mask.shape
    masks = {name: mask.flatten() for name, mask in local.groups(seen.mask).items() if name != "border"}
    place = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), -1).float()
    pixels = local.patch_pixels(255 * seen.kept.pixels, seen.model.anatomy.patch_size[0])
    truth = {"pixels": pixels.flatten(0, 1), "place": place.flatten(0, 1).repeat(n, 1)}
    tokens = seen.tokens[:, -rows * cols :].flatten(0, 1)
    ids = torch.arange(n).repeat_interleave(rows * cols)
    columns = ["group", "fit", "test", "l2", "relative"]
    return {
        what: local.reconstruction_probe(tokens, values, masks, ids, max_tokens=TOKENS)[columns].set_index(columns[:2])
        for what, values in truth.items()
    }


def _classified(seen: Look, numbers: dict, tables: dict, parts: list[str]) -> str:
    """The answer by one-token classification: of each image cls, a random outlier and its nearest normal token."""
    import pandas as pd

    if seen.labels is None:
        parts.append("No labels: `--labels` takes sub-folders, or a labels.csv (file, class_index), for classes.")
        return "no labels"
    flat = seen.mask.flatten(1)
    partner = local.matched_normal(seen.mask).flatten(1)
    has_both = flat.any(1) & partner.any(1)
    sizes = Counter(seen.labels[has_both].tolist())
    classes = sorted(label for label, size in sizes.items() if size >= PER_CLASS)
    chosen = has_both & torch.isin(seen.labels, torch.tensor(classes, dtype=torch.long))
    if len(classes) < 2:
        parts.append(f"Too few labels: no two classes have {PER_CLASS} images with outliers.")
        return "too few labels"
    noise, prefix = torch.Generator().manual_seed(0), seen.tokens.shape[1] - flat.shape[1]
    places_of = {"outlier": flat, "matched": partner}
    drawn = {k: (torch.rand(m.shape, generator=noise) * m).argmax(1) + prefix for k, m in places_of.items()}
    drawn |= {"cls": torch.zeros(len(flat), dtype=torch.long)} if seen.model.anatomy.has_cls else {}
    rows, y = torch.arange(len(flat))[chosen], torch.searchsorted(torch.tensor(classes), seen.labels[chosen])
    right = {kind: _right(seen.tokens[rows, at[chosen]], y) for kind, at in drawn.items()}
    table = pd.DataFrame({k: [r.double().mean().item(), *interval(r)] for k, r in right.items()}).T
    table.columns = ["accuracy", "low", "high"]
    tables[f"Class of the image by one token, {len(classes)} classes, {len(y)} images"] = table
    numbers |= {f"accuracy_{kind}": value for kind, value in table.accuracy.items()}
    low, high = interval(right["outlier"].double() - right["matched"].double())
    answer = "global information" if low > 0 else "less than their neighbours" if high < 0 else "no more than others"
    parts.append(
        f"One outlier token names the class of {table.accuracy['outlier']:.0%} of {len(y)} images ({len(classes)} "
        f"classes), its nearest normal token of {table.accuracy['matched']:.0%}"
        + (f", cls of {table.accuracy['cls']:.0%}" if "cls" in right else "")
        + f" (difference {100 * low:.0f} to {100 * high:.0f} points)."
    )
    return answer


def _right(features: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(images,) bool: whether logistic regression on the other four fifths predicts the class."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fit = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    folds = StratifiedKFold(PER_CLASS, shuffle=True, random_state=0)
    guess = cross_val_predict(fit, features.float().numpy(), y.numpy(), cv=folds)
    return torch.from_numpy(guess) == y


@asks("Do they hurt?")
def hurt(seen: Look) -> Answer:
    """Whether artifacts hurt: by attention of cls, and by smoothness and object discovery with and without outliers."""
    found, numbers, parts = seen.detection, {}, []
    of_cls, mask = seen.observed.received(found.outliers.layer).get("cls"), found.outliers.mask.flatten(1)
    if of_cls is not None:
        mass = (of_cls / of_cls.sum(1, keepdim=True) * mask).sum(1)
        low, high = interval(mass)
        numbers |= {"attention_on_outliers": mass.mean().item()}
        numbers |= {"attention_on_outliers_low": low, "attention_on_outliers_high": high}
        parts.append(
            f"Outliers take {mass.mean():.0%} ({low:.0%} to {high:.0%}) of what cls gives to patches; "
            f"{mask.float().mean():.1%} of the patches they are."
        )
    of_head = _pooling(seen)
    if of_head is not None:
        mass_of_head = (of_head * seen.mask.flatten(1)).sum(1) / of_head.sum(1)
        low, high = interval(mass_of_head)
        numbers |= {"pooling_on_outliers": mass_of_head.mean().item()}
        numbers |= {"pooling_on_outliers_low": low, "pooling_on_outliers_high": high}
        parts.append(f"They take {mass_of_head.mean():.0%} ({low:.0%} to {high:.0%}) of the pooling head's attention.")
    lost, grid = boxes(seen), seen.mask.shape[1:]
    moved, on_outlier = lost["moved"].float().mean().item(), lost["seed_on_outlier"].float().mean().item()
    numbers |= {"lost_boxes_moved": moved, "lost_seeds_on_outliers": on_outlier}
    patches, valid = seen.tokens[:, -grid[0] * grid[1] :], ~seen.mask.flatten(1)
    alike = {"all": maps.neighbour_similarity(patches, grid), "normal": maps.neighbour_similarity(patches, grid, valid)}
    smooth = {name: values.nanmean().item() for name, values in alike.items()}
    numbers |= {f"neighbour_similarity_{name}": value for name, value in smooth.items()}
    parts.append(
        f"Left out, they change LOST's box in {moved:.0%} of {len(lost['moved'])} images, and neighbouring tokens are "
        f"alike by {smooth['normal']:.2f} instead of {smooth['all']:.2f} (cosine)."
    )
    labels = _head_labels(seen)
    if labels is not None:
        with evaluating(seen.model.module):
            logits = [seen.model.module.forward_head(t.to(seen.model.weights)).cpu() for t in seen.tokens.split(BATCH)]
        right = torch.cat(logits).argmax(1) == labels
        low, high = interval(right)
        numbers |= {"accuracy": right.double().mean().item(), "accuracy_low": low, "accuracy_high": high}
        parts.append(
            f"The head is right on {numbers['accuracy']:.0%} ({low:.0%} to {high:.0%}) of {len(right)} images; what it "
            "is after a remedy stands in the table of remedies."
        )
    if of_cls is not None:
        answer = f"{mass.mean():.0%} of cls attention"
    else:
        answer = f"{moved:.0%} of boxes moved" if of_head is None else f"{mass_of_head.mean():.0%} of pooling attention"
    size, half = torch.tensor(seen.model.anatomy.patch_size[::-1]).repeat(2), len(seen.sample) // 2
    drawn = {name: size * lost[name][half:][:SHOWN] for name in ("all patches", "outliers left out")}
    return Answer(answer, " ".join(parts), numbers, maps=drawn)


def _pooling(seen: Look) -> torch.Tensor | None:
    """(kept images, patches) attention of a SigLIP's pooling head, of timm or transformers, mean over heads; None
    without one."""
    module, rows = seen.model.module, []
    of_siglip = (part for part in module.modules() if type(part).__name__.endswith("MultiheadAttentionPoolingHead"))
    if (head := next(of_siglip, None)) is not None:
        with evaluating(module):
            for tokens in seen.tokens.split(BATCH):
                x = tokens.to(seen.model.weights)
                rows.append(head.attention(head.probe.expand(len(x), -1, -1), x, x)[1][:, 0])
        return torch.cat(rows)[:, -seen.mask[0].numel() :].float().cpu()
    pool = getattr(module, "attn_pool", None)
    if type(pool).__name__ != "AttentionPoolLatent":
        return None

    def entering(part, inputs):
        x = inputs[0] if pool.pos_embed is None else inputs[0] + pool.pos_embed
        both = pool.q(pool.latent), pool.kv(x).chunk(2, 2)[0]
        q, k = (y.unflatten(2, (pool.num_heads, -1)).transpose(1, 2) for y in both)
        rows.append(attention_rows(pool.q_norm(q), pool.k_norm(k)).mean((1, 2)))

    with evaluating(module), hooks((pool.register_forward_pre_hook, entering)):
        for tokens in seen.tokens.split(BATCH):
            module.forward_head(tokens.to(seen.model.weights))
    return torch.cat(rows)[:, -seen.mask[0].numel() :].float().cpu()


def boxes(seen: Look) -> dict[str, torch.Tensor]:
    """LOST's boxes (images, 4), in patches, for the sample: with "all patches", and with "outliers left out".

    moved: (images,) whether the two overlap by less than one half; seed_on_outlier: whether LOST starts on an outlier.
    """
    site = objects.paper_site(seen.model)
    captured = seen.model.capture(seen.kept.x[seen.sample], site, layers=-1)
    features, mask = objects.features(captured, site), seen.mask[seen.sample].flatten(1)
    whole = objects.lost(features, captured.grid)
    normal = objects.lost(features, captured.grid, valid=~mask)
    on_outlier = mask.gather(1, whole.seeds[:, None])[:, 0]
    moved = objects.box_iou(whole.boxes, normal.boxes) < 0.5
    drawn = {"all patches": whole.boxes, "outliers left out": normal.boxes}
    return drawn | {"moved": moved, "seed_on_outlier": on_outlier}


def _head_labels(seen: Look) -> torch.Tensor | None:
    """The labels, where the head has a class for each of them; None otherwise."""
    classes = getattr(seen.model.module, "num_classes", 0) or 0
    fits = seen.labels is not None and hasattr(seen.model.module, "forward_head")
    fits = fits and image_sets.labels_fit(seen.kept, classes) and int(seen.labels.max()) < classes
    return seen.labels if fits else None


@asks("What helps?")
def helps(seen: Look) -> Answer:
    """Each remedy, chosen on one half of the sample and scored on the other, beside as many random neurons."""
    found, name, sample = seen.detection, seen.name, seen.sample
    advice = f"Registers trained in: `vitreg train registers --model {name}`."
    labels = _head_labels(seen)
    try:
        tried = remedies.trial(
            seen.model, seen.kept.x[sample], found.outliers, labels=None if labels is None else labels[sample]
        )
    except (UserError, TypeError) as error:
        return Answer("trained registers", f"Nothing could be tried: {error}. {advice}")
    table, best = tried.table, remedies.best(tried.shares)
    first, at, control = table.iloc[0], table.loc[best], table.loc[remedies.RANDOM]
    numbers = {f"best_{column}": at[column] for column in table} | {"outliers_before": first.outliers}
    numbers |= {"random_neurons_outliers": control.outliers, "neurons": len(tried.search.neurons)}
    titled = {f"Remedies on {len(sample) - len(sample) // 2} images on which nothing was chosen": table}
    norm_maps = {k: norms[:SHOWN].unflatten(1, seen.mask.shape[1:]) for k, norms in tried.norms.items()}
    if at.outliers > mend.MENDED * first.outliers:
        text = f"Nothing tried helps: the best, {best}, leaves {at.outliers:.2%} outliers of {first.outliers:.2%}."
        text += f" {advice}"
        return Answer("trained registers", text, numbers, titled, norm_maps)
    cost = f"features turn by {at.features_apart:.3f} (1 - cosine)"
    if "same_answer" in table:
        cost += f", logits by {at.answers_kl:.3f} nats, and {at.same_answer:.0%} of the images keep their answer"
    text = (
        f"{best} leaves {at.outliers:.2%} of the patch tokens outliers of {first.outliers:.2%}, as many random neurons "
        f"{control.outliers:.2%}; {cost}. Test-time registers: `vitreg mend {name} --save FILE`. {advice}"
    )
    return Answer(best.removeprefix(name), text, numbers, titled, norm_maps)


ASKED = (any_there, kind, held, hurt, helps)
