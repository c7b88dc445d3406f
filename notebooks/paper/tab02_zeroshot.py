"""Zero-shot classification of Table 2b: the questions about the images, and the text tower of a model.

`model.text` embeds the classes. The names and prompts of ImageNet come from open_clip. Scenes are classified by
each of their attributes, with the sentences that the recipe `clip` trains on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vitreg_lib import base
from vitreg_lib.base import UserError
from vitreg_lib.data.scenes import ATTRIBUTES, targets
from vitreg_lib.measure import pairs
from vitreg_lib.model import text, zoo
from vitreg_lib.model.text import TEMPLATES, class_embeddings, tokenizer
from vitreg_lib.model.weights import read_safetensors


def evaluate(models, load):
    """(DataFrame, hits): zero-shot accuracy of every model that has a text tower; others are left out.

    load(model) returns the `Images`, the same for all models. Index (model, question); columns accuracy, low, high (the
    middle 95 % of a bootstrap over images), chance (share of the most frequent class), classes (their number). hits:
    {(model, question): (images,) bool}.
    """
    import pandas as pd

    from vitreg_lib.data.images import labels

    rows, hits = {}, {}
    for model in models:
        try:
            encode_text, tokenize = text_tower(model)
        except UserError:
            continue
        pictures = load(model)
        images = image_embeddings(model, pictures.x)
        for question in questions(pictures, None if pictures.scenes is not None else labels(pictures)):
            classes = class_embeddings(encode_text, tokenize, question.classes, question.templates)
            key = (model.label, question.name)
            hits[key] = predict(images, classes) == question.labels
            low, high = pairs.interval(hits[key])
            rows[key] = {"accuracy": hits[key].double().mean().item(), "low": low, "high": high}
            rows[key] |= {"chance": question.labels.bincount().max().item() / len(images), "classes": len(classes)}
    columns = ["accuracy", "low", "high", "chance", "classes"]
    index = pd.MultiIndex.from_tuples(rows, names=["model", "question"])
    return pd.DataFrame(list(rows.values()), index=index, columns=columns), hits


def change(hits: dict, without: str, name: str) -> tuple[float, float, float]:
    """(points, low, high): zero-shot accuracy of `name` minus that of `without`, averaged over the questions.

    hits: of `evaluate`; low and high: the middle 95 % of a paired bootstrap over images.
    """
    from vitreg_lib.measure.objects import gain

    shared = [q for m, q in hits if m == name and (without, q) in hits]
    if not shared:
        raise ValueError(f"{without} and {name} were not asked the same questions")
    return gain(*(torch.stack([hits[m, q] for q in shared]).double().mean(0) for m in (without, name)))


@dataclass
class Question:
    """One classification task: names of the classes, prompts for `class_embeddings`, and the right answers."""

    name: str
    classes: tuple[str, ...]
    templates: tuple
    labels: Tensor  # (images,) class numbers


@torch.no_grad()
def image_embeddings(model, x: Tensor, batch_size: int = 64) -> Tensor:
    """(images, dim) of unit norm: the output of a `zoo.Model` whose head projects into the space of the texts."""
    parts = [model.module(batch.to(model.weights)).float().cpu() for batch in x.split(batch_size)]
    return normalize(torch.cat(parts), dim=1)


def text_tower(model):
    """(encode_text, tokenize) that belong to a `zoo.Model`; with test-time registers or random weights, its base's.

    Raises UserError for a model without a text tower.
    """
    name = model.entry
    entry = zoo.entries().get(name, {})
    path = base.CHECKPOINTS / f"{name}.text.safetensors"
    if path.exists():
        return load_text(path), tokenizer()
    if "open_clip" in entry:
        import open_clip

        arch, _, tag = entry["open_clip"].partition("/")
        with base.hub(f"{name}: open_clip's {entry['open_clip']}", "mini-clip has its text tower here"):
            tower = open_clip.create_model(arch, pretrained=tag).eval()
            return tower.encode_text, open_clip.get_tokenizer(arch)
    raise UserError(f"{model.label} has no text tower here: nothing to ask it in words")


def load_text(path) -> nn.Module:
    """A text tower of the repository, from its `.text.safetensors`."""
    metadata, state = read_safetensors(path)
    config, context = json.loads(metadata["config"]), len(state["positional_embedding"])
    tower = text.text_tower(config["text_width"], config["text_layers"], config["embed_dim"], context)
    tower.load_state_dict({name: values.float() for name, values in state.items()})
    return tower.eval()


def questions(pictures, labels: Tensor | None = None) -> list[Question]:
    """The questions for an `Images` set: each attribute of scenes, or ImageNet's thousand classes for labelled photos.

    labels: class numbers (images,) of photos. Raises UserError for photos without labels.
    """
    if pictures.scenes is not None:
        wanted = targets(pictures.scenes)
        return [Question(name, tuple(ATTRIBUTES[name]), TEMPLATES[name], wanted[name]) for name in ATTRIBUTES]
    if labels is None:
        raise UserError(f"{pictures.source}: zero-shot classification needs labelled images (labels.csv, class_index)")
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    return [Question("ImageNet", tuple(IMAGENET_CLASSNAMES), tuple(OPENAI_IMAGENET_TEMPLATES), labels)]


def predict(images: Tensor, classes: Tensor) -> Tensor:
    """(images,) the class with the largest cosine, the first one of a tie; images and classes (n, dim), of any norm.

    Raises ValueError for other shapes and for embeddings that are not finite.
    """
    if images.ndim != 2 or classes.ndim != 2 or images.shape[1] != classes.shape[1]:
        raise ValueError(
            f"images {tuple(images.shape)} and classes {tuple(classes.shape)} do not share a space: is the head of the "
            "image tower the projection that was trained with this text tower?"
        )
    for name, x in (("images", images), ("classes", classes)):
        if not torch.isfinite(x).all():
            raise ValueError(f"embeddings of {name} hold NaN or infinite values")
    return (normalize(images.float(), dim=1) @ normalize(classes.float(), dim=1).T).argmax(1)
