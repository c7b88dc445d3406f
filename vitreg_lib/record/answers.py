"""Five questions about the artifacts of a model, each answered by a word, sentences, numbers and tables.

`ask` answers one of the `QUESTIONS` about a `Look`. Three of them presuppose artifacts and are not asked of a model
without. The sentences stand in sentences.yaml.
"""

import math
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from ..base import UserError
from ..data import images as image_sets
from ..hooks.capture import attention_rows, evaluating, hooks
from ..measure import maps, objects, places
from ..measure.detection import FEWEST, registers_alike
from ..measure.pairs import interval
from ..model import mend, names, remedies
from ..probes import local
from .look import BATCH, SHOWN, Look

QUESTIONS = {
    "any_there": "Are there any?",
    "kind": "What kind are they?",
    "held": "What do they hold?",
    "hurt": "Do they hurt?",
    "helps": "What helps?",
}
SENTENCES: dict[str, str] = yaml.safe_load(Path(__file__).with_name("sentences.yaml").read_text())
NOT_ASKED = {"none": "none to ask about", "undecided": "undecided"}  # the answer, by the detector's
PER_CLASS = 5  # images of a class, for five-fold cross-validation
TOKENS = 4000  # for training a local probe
COPIES = 0.99  # from this cosine on, two registers count as copies
SINK = 10.0  # even shares of the attention of other patches


@dataclass
class Answer:
    """answer: a word or two. numbers: None where not measured. tables: DataFrames by title, rows by name. maps: of the
    shown images, by name, (images, rows, cols), or boxes (images, 4) in pixels."""

    answer: str
    sentences: list[str] = field(default_factory=list)
    numbers: dict[str, float | int | None] = field(default_factory=dict)
    tables: dict = field(default_factory=dict)
    maps: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        return " ".join(self.sentences)

    def say(self, name: str, /, **words) -> None:
        """Add the sentence of that name, with the numbers and these words put in."""
        self.sentences.append(self.text(name, **words))

    def text(self, name: str, /, **words) -> str:
        return SENTENCES[name].format(**self.numbers | words)

    def average(self, name: str, values: torch.Tensor) -> None:
        """Keep the mean of values (images,) and the ends of its 95 % interval as NAME, NAME_low and NAME_high."""
        low, high = interval(values)
        mean = (values.double() if values.dtype == torch.bool else values).mean().item()
        self.numbers |= {name: mean, f"{name}_low": low, f"{name}_high": high}


def ask(question: str, look: Look) -> Answer:
    """The answer to the question of that name."""
    detected = look.detection.answer
    if detected == "artifacts" or question in ("any_there", "kind"):
        return ASKED[question](look)
    answer = Answer(NOT_ASKED[detected])
    answer.say(f"not_asked_{detected}")
    return answer


def any_there(look: Look) -> Answer:
    """Whether there are artifacts: by the detector, with the share of outliers in all images."""
    detection, norms = look.detection, look.detection.outliers.norms
    answer = Answer(detection.answer)
    answer.numbers |= dict(
        images=len(look.shares),
        images_judged=detection.images,
        images_needed=detection.images_needed,
        blocks=look.model.anatomy.depth,
        median_norm=norms.median().item(),
        largest_norm=norms.max().item(),
        **dict.fromkeys(("outlier_share", "outlier_share_low", "outlier_share_high", "images_with_outliers_high")),
        support=detection.support,
        **dict.fromkeys(("cutoff", "norm_ratio", "onset_layer")),
    )
    if detection.answer == "none":
        answer.numbers |= dict(outlier_share=0.0, images_with_outliers_high=1 - 0.05 ** (1 / detection.images))
    elif detection.has_artifacts:
        answer.average("outlier_share", look.shares)
        answer.numbers |= dict(cutoff=detection.outliers.cutoff, norm_ratio=detection.norm_ratio)
        answer.numbers["onset_layer"] = detection.onset
    answer.say(detection.answer, reason=detection.reason, strength=detection.strength, layer=detection.outliers.layer)
    return answer


def kind(look: Look) -> Answer:
    """Whether artifacts depend on place or content; for any model, also attention sinks and equal registers."""
    detection = look.detection
    answer = Answer(detection.kind or NOT_ASKED[detection.answer])
    if detection.has_artifacts:
        _place_or_content(look, answer)
    if detection.images >= FEWEST:
        _sinks(look, answer)
    alike = registers_alike(look.model, look.kept)
    answer.numbers["largest_cosine_of_registers"] = alike
    if alike is not None:
        answer.say("copies" if alike >= COPIES else "no_copies", registers=look.model.anatomy.num_registers)
    if not answer.sentences:
        answer.say(f"not_asked_{detection.answer}")
    return answer


def _place_or_content(look: Look, answer: Answer) -> None:
    """What predicts outliers, and whether they follow place or content when these are separated."""
    detection, x = look.detection, look.kept.x[look.sample]
    answer.numbers["explained_by_place"] = detection.place
    answer.say("place", Kind=f"{detection.kind[0].upper()}{detection.kind[1:]}")
    try:
        table = places.tests(look.model, x, detection.outliers.cutoff, layer=detection.outliers.layer)
    except ValueError as error:
        answer.say("no_intervention", error=error)
        return
    first, grey = table.iloc[0], table.outliers["a grey image"]
    answer.tables[f"Where outliers go when place and content part company, {len(x)} images"] = table
    answer.numbers |= dict(follows_place=first.follows_place, follows_content=first.follows_content)
    answer.numbers["outliers_in_grey"] = grey
    answer.say("intervention", exchanged=table.index[0])


def _sinks(look: Look, answer: Answer) -> None:
    """Patches of usual norm that receive much attention from others."""
    received = look.observed.received(look.detection.outliers.layer).get("patches")
    if received is None:
        return
    sink, outlier = received >= SINK, look.detection.outliers.mask.flatten(1)
    usual = (sink & ~outlier).sum().item() / max(sink.sum().item(), 1)
    answer.numbers |= dict(sink_share=sink.float().mean().item(), sinks_of_usual_norm=usual if sink.any() else None)
    answer.say("sinks" if sink.any() else "no_sinks", sink=SINK)


def held(look: Look) -> Answer:
    """What outliers hold: the class of the image, by one token; pixels and place of their own patch, by probes."""
    answer = Answer("")
    _classified(look, answer)
    try:
        probes = _local(look)
    except ValueError as error:
        answer.say("few_images", error=error)
        return answer
    errors = {}
    for what, table in probes.items():
        title = f"{what.capitalize()} of a token's own patch, read linearly, {len(look.kept)} images; by group and by "
        title += "what the probe was fitted on; relative: to the error of a constant guess"
        answer.tables[title] = table.set_axis(table.index.map(", ".join))
        best = {group: table.relative.xs(group).min() for group in ("outlier", "matched")}
        errors |= {f"{what}_error_{group}": value for group, value in best.items()}
    answer.numbers |= errors
    answer.say("local" if all(map(math.isfinite, errors.values())) else "few_outliers")
    return answer


def _local(look: Look) -> dict:
    """{"pixels", "place": table}: ridge regression of a patch's pixels, and of its row and column, by group and fit."""
    n, rows, cols = look.mask.shape
    masks = {name: mask.flatten() for name, mask in local.groups(look.mask).items() if name != "border"}
    place = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), -1).float()
    pixels = local.patch_pixels(255 * look.kept.pixels, look.model.anatomy.patch_size)
    truth = {"pixels": pixels.flatten(0, 1), "place": place.flatten(0, 1).repeat(n, 1)}
    tokens = look.tokens[:, -rows * cols :].flatten(0, 1)
    ids = torch.arange(n).repeat_interleave(rows * cols)
    columns = ["group", "fit", "test", "l2", "relative"]
    return {
        what: local.reconstruction_probe(tokens, values, masks, ids, max_tokens=TOKENS)[columns].set_index(columns[:2])
        for what, values in truth.items()
    }


def _classified(look: Look, answer: Answer) -> None:
    """One-token classification: of each image cls, a random outlier and its nearest normal token."""
    import pandas as pd

    if look.labels is None:
        answer.answer = "no labels"
        answer.say("no_labels")
        return
    flat = look.mask.flatten(1)
    partner = local.matched_normal(look.mask).flatten(1)
    has_both = flat.any(1) & partner.any(1)
    sizes = Counter(look.labels[has_both].tolist())
    classes = torch.tensor(sorted(label for label, size in sizes.items() if size >= PER_CLASS), dtype=torch.long)
    if len(classes) < 2:
        answer.answer = "too few labels"
        answer.say("few_labels", per_class=PER_CLASS)
        return
    chosen = has_both & torch.isin(look.labels, classes)
    noise, prefix = torch.Generator().manual_seed(0), look.tokens.shape[1] - flat.shape[1]
    masks = {"outlier": flat, "matched": partner}
    drawn = {name: (torch.rand(m.shape, generator=noise) * m).argmax(1) + prefix for name, m in masks.items()}
    drawn |= {"cls": torch.zeros(len(flat), dtype=torch.long)} if look.model.anatomy.has_cls else {}
    rows, y = torch.arange(len(flat))[chosen], torch.searchsorted(classes, look.labels[chosen])
    right = {name: _right(look.tokens[rows, at[chosen]], y) for name, at in drawn.items()}
    table = pd.DataFrame({name: [r.double().mean().item(), *interval(r)] for name, r in right.items()}).T
    table.columns = ["accuracy", "low", "high"]
    answer.tables[f"Class of the image by one token, {len(classes)} classes, {len(y)} images"] = table
    answer.numbers |= {f"accuracy_{name}": value for name, value in table.accuracy.items()}
    low, high = interval(right["outlier"].double() - right["matched"].double())
    less = "less than their neighbours" if high < 0 else "no more than others"
    answer.answer = "global information" if low > 0 else less
    sizes = dict(images=len(y), classes=len(classes))
    answer.say("classes_and_cls" if "cls" in right else "classes", low=100 * low, high=100 * high, **sizes)


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


def hurt(look: Look) -> Answer:
    """Whether artifacts hurt: by attention of cls, and by smoothness and object discovery with and without outliers."""
    outliers, answer = look.detection.outliers, Answer("")
    of_cls, of_head = look.observed.received(outliers.layer).get("cls"), _pooling(look)
    if of_cls is not None:
        mask = outliers.mask.flatten(1)
        answer.average("attention_on_outliers", (of_cls / of_cls.sum(1, keepdim=True) * mask).sum(1))
        answer.say("attention", share=mask.float().mean())
    if of_head is not None:
        answer.average("pooling_on_outliers", (of_head * look.mask.flatten(1)).sum(1) / of_head.sum(1))
        answer.say("pooling")
    lost, grid = _lost(look), look.mask.shape[1:]
    patches, valid = look.tokens[:, -grid[0] * grid[1] :], ~look.mask.flatten(1)
    alike = {"all": maps.neighbour_similarity(patches, grid), "normal": maps.neighbour_similarity(patches, grid, valid)}
    answer.numbers["lost_boxes_moved"] = lost["moved"].float().mean().item()
    answer.numbers["lost_seeds_on_outliers"] = lost["seed_on_outlier"].float().mean().item()
    answer.numbers |= {f"neighbour_similarity_{name}": values.nanmean().item() for name, values in alike.items()}
    answer.say("lost", images=len(lost["moved"]))
    labels = _head_labels(look)
    if labels is not None:
        head, tokens = look.model.module.forward_head, look.tokens.split(BATCH)
        with evaluating(look.model.module):
            logits = torch.cat([head(part.to(look.model.weights)).cpu() for part in tokens])
        answer.average("accuracy", logits.argmax(1) == labels)
        answer.say("head", images=len(labels))
    heads = {"attention_on_outliers": "cls attention", "pooling_on_outliers": "pooling attention"}
    name = next((name for name in heads if name in answer.numbers), "lost_boxes_moved")
    answer.answer = f"{answer.numbers[name]:.0%} of {heads.get(name, 'boxes moved')}"
    shown, size = slice(len(look.sample) // 2, len(look.sample) // 2 + SHOWN), look.model.anatomy.patch_size
    answer.maps = {name: objects.in_pixels(lost[name][shown], size) for name in ("all patches", "outliers left out")}
    return answer


def _pooling(look: Look) -> torch.Tensor | None:
    """(kept images, patches) attention of a SigLIP's pooling head, of timm or transformers, mean over heads; None
    without one."""
    module, rows = look.model.module, []
    of_siglip = (part for part in module.modules() if type(part).__name__.endswith("MultiheadAttentionPoolingHead"))
    if (head := next(of_siglip, None)) is not None:
        with evaluating(module):
            for tokens in look.tokens.split(BATCH):
                x = tokens.to(look.model.weights)
                rows.append(head.attention(head.probe.expand(len(x), -1, -1), x, x)[1][:, 0])
        return torch.cat(rows)[:, -look.mask[0].numel() :].float().cpu()
    pool = getattr(module, "attn_pool", None)
    if type(pool).__name__ != "AttentionPoolLatent":
        return None

    def entering(part, inputs):
        x = inputs[0] if pool.pos_embed is None else inputs[0] + pool.pos_embed
        both = pool.q(pool.latent), pool.kv(x).chunk(2, 2)[0]
        q, k = (y.unflatten(2, (pool.num_heads, -1)).transpose(1, 2) for y in both)
        rows.append(attention_rows(pool.q_norm(q), pool.k_norm(k)).mean((1, 2)))

    with evaluating(module), hooks((pool.register_forward_pre_hook, entering)):
        for tokens in look.tokens.split(BATCH):
            module.forward_head(tokens.to(look.model.weights))
    return torch.cat(rows)[:, -look.mask[0].numel() :].float().cpu()


def _lost(look: Look) -> dict[str, torch.Tensor]:
    """LOST's boxes (images, 4), in patches, for the sample: with "all patches", and with "outliers left out".

    moved: (images,) whether the two overlap by less than one half; seed_on_outlier: whether LOST starts on an outlier.
    """
    site = objects.paper_site(look.model)
    captured = look.model.capture(look.kept.x[look.sample], site, layers=-1)
    features, mask = objects.features(captured, site), look.mask[look.sample].flatten(1)
    whole = objects.lost(features, captured.grid)
    normal = objects.lost(features, captured.grid, valid=~mask)
    boxes = {"all patches": whole.boxes, "outliers left out": normal.boxes}
    moved = objects.box_iou(whole.boxes, normal.boxes) < 0.5
    return boxes | {"moved": moved, "seed_on_outlier": mask.gather(1, whole.seeds[:, None])[:, 0]}


def _head_labels(look: Look) -> torch.Tensor | None:
    """The labels, where the head has a class for each of them; None otherwise."""
    classes = getattr(look.model.module, "num_classes", 0) or 0
    fits = look.labels is not None and hasattr(look.model.module, "forward_head")
    fits = fits and image_sets.labels_fit(look.kept, classes) and int(look.labels.max()) < classes
    return look.labels if fits else None


def helps(look: Look) -> Answer:
    """Each remedy, chosen on one half of the sample and scored on the other, beside as many random neurons."""
    labels, answer = _head_labels(look), Answer("trained registers")
    labels = None if labels is None else labels[look.sample]
    # a module in memory, or NAME+ttrN already: no command can name what is made of it
    unnamed = look.model.label == type(look.model.module).__name__ or names.split(look.model.label)[1] != ""
    try:
        tried = remedies.trial(look.model, look.kept.x[look.sample], look.detection.outliers, labels=labels)
    except (UserError, TypeError) as error:
        answer.say("not_tried", error=error)
    else:
        _scored(look, tried, answer, unnamed)
    if hasattr(look.model.module, "reg_token") and not unnamed:  # timm's alone can have registers trained in
        answer.say("train", name=shlex.quote(look.model.label))
    return answer


def _scored(look: Look, tried: remedies.Trial, answer: Answer, unnamed: bool) -> None:
    """What the remedies did, and how to mend the model as the best one does."""
    table, best = tried.table, remedies.best(tried.chosen_on)
    first, at, images = table.iloc[0], table.loc[best], len(look.sample) - len(look.sample) // 2
    answer.numbers = {f"best_{column}": at[column] for column in table} | {"outliers_before": first.outliers}
    answer.numbers["random_neurons_outliers"] = table.loc[remedies.RANDOM].outliers
    answer.numbers["neurons"] = len(tried.search.neurons)
    title = f"Remedies on {images} images on which nothing was chosen. Outliers and attention: shares; "
    answer.tables[title + "answers kl: in nats; apart: 1 - cosine"] = table
    answer.maps = {name: norms[:SHOWN].unflatten(1, look.mask.shape[1:]) for name, norms in tried.norms.items()}
    if at.outliers > mend.MENDED * first.outliers:
        answer.say("helps_not", best=best)
        return
    answer.answer = best.removeprefix(look.model.label)
    _, kind, number = names.split(answer.answer)
    source = f" --images {shlex.quote(look.source)}" * bool(look.source)
    command = f"vitreg mend {shlex.quote(best)}{source} --save mended.safetensors"
    command = f"vr.mend.with_added(model, {kind!r}, {number})" if unnamed else command
    kept = answer.text("answers", images=images) if "same_answer" in table else ""
    answer.say("helps", best=best, command=command, answers=kept)


ASKED = {each.__name__: each for each in (any_there, kind, held, hurt, helps)}
