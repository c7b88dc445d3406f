r"""Training on images with captions, as CLIP (Radford et al. 2021; OpenCLIP): match images and captions in a batch.

The image tower is a mini ViT whose head projects the cls token; the text tower, the tokenizer and the loss come from
open_clip. A scene's caption names its main object (texture, colour, shape), another object and its relative position,
and the kind of background.

    vitreg train clip --registers 4
    torchrun --nproc-per-node 8 -m vitreg_lib.cli train clip --size b/16 --registers 4 --data PAIRS --image-size 224 \
        --embed-dim 512 --text-width 512 --text-layers 12 --context 77 --optimizer adamw --learning-rate 1e-3 \
        --weight-decay 0.2 --batch-size 4096 --steps 500000 --warmup 2000    # not run here
"""

from __future__ import annotations

import functools
import math
from operator import attrgetter

import torch
import torch.nn.functional as F
import training_images
from torch import nn

from vitreg_lib.base import UserError
from vitreg_lib.data.scenes import ATTRIBUTES, BACKGROUNDS, COLOURS, MAX_OBJECTS, MEAN, SHAPES, STD, TEXTURES, Scenes
from vitreg_lib.model import text as texts
from vitreg_lib.model.text import TEMPLATES, text_tower, tokenizer
from vitreg_lib.train import images, parallel

LEARNS_FROM = "captions"
OPTIONS = {
    "embed_dim": (64, "dimension of the common space of images and captions"),
    "text_width": (32, "embed_dim of the text tower"),
    "text_layers": (2, "blocks of the text tower"),
    "context": (24, "largest number of tokens of a caption"),
}
DEFAULTS = {"size": "s", "steps": 800, "batch_size": 128}
CAPTIONS = ("caption", "text", "txt")  # columns that hold a caption
IMAGES = ("image", "jpg", "jpeg", "png", "webp")  # columns that hold an image
SEPARABLE = False  # each image is compared with all captions of the batch


class Clip(nn.Module):
    """Image tower, text tower, and the logarithm of the logits' scale, the inverse of CLIP's temperature."""

    def __init__(self, config):
        super().__init__()
        self.visual = config.vit(config.embed_dim, drop_path_rate=config.drop_path)
        self.text = text_tower(config.text_width, config.text_layers, config.embed_dim, config.context)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, embed_dim), of unit norm, for normalised images (n, 3, h, w)."""
        return F.normalize(self.visual(pixels), dim=1)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """(n, embed_dim), of unit norm, for token ids (n, context)."""
        return F.normalize(self.text(text), dim=1)


build = Clip
backbone = attrgetter("visual")  # the image tower


def companions(module) -> dict[str, dict]:
    """The weights of the text tower, which are saved beside the image tower."""
    return {"text": module.text.state_dict()}


def pairs(config, step: int, device) -> tuple[torch.Tensor, list[str]]:
    """This process's images (n, 3, size, size) of a step, in [0, 1], and their captions."""
    if not config.data:
        batch = images.rendered(config, step, device)
        return batch.pixels, captions_of(batch)
    source = captioned(config.data, "train")
    pixels, captions = training_images.stream(config, str(device), source, config.image_size).batch(step)
    return pixels, list(captions)


def captions_of(batch: Scenes) -> list[str]:
    """One sentence a scene: the main object, another object with its relative position, the background."""
    colour, shape, texture = (getattr(batch, name).tolist() for name in ("colour", "shape", "texture"))
    visible, place, background = batch.visible.tolist(), batch.place.cpu(), batch.background.tolist()

    def noun(i: int, k: int) -> str:
        words = [TEXTURES[texture[i][k]], COLOURS[colour[i][k]], SHAPES[shape[i][k]]]
        return " ".join(words if words[0] != "plain" else words[1:])

    captions = []
    for i in range(len(batch)):
        text = f"a {noun(i, 0)}"
        other = next((k for k in range(1, MAX_OBJECTS) if visible[i][k]), None)
        if other is not None:
            dx, dy = (place[i, 0] - place[i, other]).tolist()
            side = ("right of" if dx > 0 else "left of") if abs(dx) > abs(dy) else ("below" if dy > 0 else "above")
            text += f" {side} a {noun(i, other)}"
        captions.append(f"{text} on a {BACKGROUNDS[background[i]]} background")
    return captions


@functools.lru_cache(maxsize=2)
def captioned(data: str, split: str) -> images.Pictures:
    """A split, "train" or "val", of the pairs of image and caption in a folder; every twentieth pair is in "val".

    The files are Parquet files or WebDataset shards (.tar with .jpg and .txt), read by `datasets`. Raises UserError for
    a folder without such files or columns.
    """
    from datasets import load_dataset

    folder = training_images.existing(data, "*.parquet or *.tar files of pairs")
    kinds = {"parquet": "*.parquet", "webdataset": "*.tar"}
    kind, files = next(((k, f) for k, end in kinds.items() if (f := sorted(map(str, folder.rglob(end))))), (None, []))
    if kind is None:
        raise UserError(f"no pairs in {folder}: it needs *.parquet with image and caption, or *.tar with .jpg and .txt")
    rows = load_dataset(kind, data_files=files, split="train")
    columns = [next((n for n in names if n in rows.features), None) for names in (IMAGES, CAPTIONS)]
    if None in columns:
        names = ", ".join(rows.features)
        raise UserError(f"{files[0]} has the columns {names}: {IMAGES[0]} and {CAPTIONS[0]} are expected")
    return images.Pictures(rows.select(training_images.every_twentieth(len(rows), split)), *columns)


def held_out(config, count: int) -> tuple[torch.Tensor, list[str]]:
    """At most `count` pairs of a folder outside the training set: images in [0, 1] and captions."""
    source = captioned(config.data, "val")
    return training_images.read(config, source, images.order(len(source), config.seed)[:count])


def telemetry_images(config) -> torch.Tensor:
    """The first held-out images, normalised."""
    if not config.data:
        return images.telemetry_images(config)
    return (held_out(config, config.telemetry_images)[0] - MEAN) / STD


def loss(module, config, step, device):
    """Cross-entropy of matching each image with its caption and the reverse, among the pairs of all ranks."""
    from open_clip.loss import ClipLoss

    pixels, captions = pairs(config, step, device)
    image = parallel.gather(module.encode_image((pixels - MEAN) / STD))
    text = parallel.gather(module.encode_text(tokenizer(config.context)(captions).to(device)))
    scale = module.logit_scale.clamp(max=math.log(100)).exp()
    value = ClipLoss()(image, text, scale)
    with torch.no_grad():
        correct = (image @ text.T).argmax(1) == torch.arange(len(image), device=device)
    return value, {"accuracy": correct.float().mean(), "scale": scale}


def class_embeddings(encode_text, attribute: str, device="cpu") -> torch.Tensor:
    """(classes, embed_dim): the mean embedding of the prompts of each value of an attribute, of unit norm."""
    return texts.class_embeddings(encode_text, tokenizer(), ATTRIBUTES[attribute], TEMPLATES[attribute], device)


def evaluate(module, config, device) -> dict[str, float]:
    """Zero-shot accuracy (0 to 1) on held-out scenes by attribute; `zeroshot` is the mean over attributes.

    With --data: `retrieval`, the share of held-out images whose nearest caption is their own.
    """
    if config.data:
        pixels, captions = held_out(config, config.eval_images)
        pictures = [module.encode_image((part.to(device) - MEAN) / STD) for part in pixels.split(64)]
        ids = tokenizer(config.context)(captions).to(device)
        texts = [module.encode_text(part) for part in ids.split(64)]
        nearest = (torch.cat(pictures) @ torch.cat(texts).T).argmax(1).cpu()
        return {"retrieval": (nearest == torch.arange(len(pixels))).float().mean().item()}
    classes = {name: class_embeddings(module.encode_text, name, device) for name in ATTRIBUTES}
    correct = dict.fromkeys(ATTRIBUTES, 0)
    for pixels, labels in training_images.held_out_scenes(config, config.eval_images, device):
        image = module.encode_image((pixels - MEAN) / STD)
        for name, wanted in labels.items():
            correct[name] += ((image @ classes[name].T).argmax(1) == wanted).sum().item()
    shares = {f"zeroshot_{name}": count / config.eval_images for name, count in correct.items()}
    return {"zeroshot": sum(shares.values()) / len(shares), **shares}
