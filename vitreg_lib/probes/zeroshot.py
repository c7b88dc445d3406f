"""Zero-shot classification by a pair of image and text tower (Table 2b): the class whose prompts are nearest.

A class is the mean of the embeddings of its prompts, each of length one, made of length one again; an image's class is
that of the largest cosine (Radford et al. 2021; open_clip does the same). Nothing is trained. `text_tower` finds the
text tower and tokenizer of a `zoo.Model`: shipped beside a mini's weights, or open_clip's. ImageNet's names and prompts
are those of open_clip; scenes are asked for each of their attributes with the sentences of `train.clip`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..base import UserError
from ..model.text import load_text, tokenizer


@dataclass
class Question:
    """What is asked of every image: names of the classes, prompts as `class_embeddings` takes them, right answers."""

    name: str
    classes: tuple[str, ...]
    templates: tuple
    labels: Tensor  # (images,) class numbers


@torch.no_grad()
def class_embeddings(encode_text, tokenize, classes, templates, batch_size: int = 256, device="cpu") -> Tensor:
    """(classes, dim) of length one: the mean over each class's prompts, for any pair of tokenizer and text encoder.

    tokenize(list of str) gives token ids (n, length), encode_text(ids) embeddings (n, dim) of any length. templates:
    texts with {} for the name, or functions from name to prompt as open_clip's are. Raises ValueError for no class or
    no template, and for embeddings that are not finite.
    """
    classes, templates = list(classes), list(templates)
    if not classes or not templates:
        raise ValueError(f"{len(classes)} classes and {len(templates)} templates: at least one of each is needed")
    texts = [t.format(c) if isinstance(t, str) else t(c) for c in classes for t in templates]
    parts = [encode_text(tokenize(texts[i : i + batch_size]).to(device)) for i in range(0, len(texts), batch_size)]
    embedded = torch.cat(parts).float()
    if not torch.isfinite(embedded).all():
        bad = int((~torch.isfinite(embedded).all(1)).nonzero()[0])
        raise ValueError(f"the embedding of the prompt {texts[bad]!r} holds NaN or infinite values")
    return normalize(normalize(embedded, dim=1).unflatten(0, (len(classes), -1)).mean(1), dim=1)


@torch.no_grad()
def image_embeddings(model, x: Tensor, batch_size: int = 64) -> Tensor:
    """(images, dim) of length one: the output of a `zoo.Model` whose head projects into the space of the texts."""
    parts = [model.module(batch.to(model.weights)).float().cpu() for batch in x.split(batch_size)]
    return normalize(torch.cat(parts), dim=1)


def predict(images: Tensor, classes: Tensor) -> Tensor:
    """(images,) the class of the largest cosine, of equal ones the first; both (n, dim), of any length.

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


def text_tower(model):
    """(encode_text, tokenize) that belong to a `zoo.Model`; test-time registers and fresh weights keep their base's.

    Raises UserError for a model that has none here.
    """
    from .. import base
    from ..base import CHECKPOINTS
    from ..model import zoo

    name = model.entry
    entry = zoo.entries().get(name, {})
    path = CHECKPOINTS / f"{name}.text.safetensors"
    if path.exists():
        return load_text(path), tokenizer()
    if "open_clip" in entry:
        import open_clip

        arch, _, tag = entry["open_clip"].partition("/")
        with base.hub(f"{name}: open_clip's {entry['open_clip']}", "mini-clip has its text tower here"):
            tower = open_clip.create_model(arch, pretrained=tag).eval()
            return tower.encode_text, open_clip.get_tokenizer(arch)
    raise UserError(f"{model.label} has no text tower here: nothing to ask it in words")


def questions(pictures, labels: Tensor | None = None) -> list[Question]:
    """What can be asked of an `Images` set: each attribute of scenes; ImageNet's thousand classes of labelled photos.

    labels: class numbers (images,) of photos. Raises UserError for photos without labels.
    """
    if pictures.scenes is not None:
        from ..data.scenes import ATTRIBUTES, targets
        from ..model.text import TEMPLATES

        wanted = targets(pictures.scenes)
        return [Question(name, tuple(ATTRIBUTES[name]), TEMPLATES[name], wanted[name]) for name in ATTRIBUTES]
    if labels is None:
        raise UserError(f"{pictures.source}: zero-shot classification needs labelled images (labels.csv, class_index)")
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    return [Question("ImageNet", tuple(IMAGENET_CLASSNAMES), tuple(OPENAI_IMAGENET_TEMPLATES), labels)]
