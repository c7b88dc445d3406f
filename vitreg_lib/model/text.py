"""The text tower and tokenizer of mini-clip, and classes as embeddings of texts (Table 2b)."""

import functools
from types import SimpleNamespace

import torch
from torch import nn

TEMPLATES = {  # what a prompt looks like for each attribute; {} is its value
    "shape": ("a {}", "a red {}", "a striped blue {}", "a {} on a plain background", "a green {} on a soft background"),
    "colour": ("a {} disc", "a {} square", "a {} star", "a striped {} triangle", "a {} cross on a plain background"),
    "texture": ("a {} red disc", "a {} blue square", "a {} yellow star on a soft background"),
    "background": ("a red disc on a {} background", "a blue star on a {} background", "a cross on a {} background"),
}


def text_tower(width: int, layers: int, embed_dim: int, context: int) -> nn.Module:
    """open_clip's text transformer over the whole vocabulary of its tokenizer; heads of 32 (mini) or 64."""
    from open_clip.transformer import TextTransformer

    heads = max(1, width // (64 if width >= 256 else 32))
    return TextTransformer(context, width=width, heads=heads, layers=layers, output_dim=embed_dim)


@functools.cache
def tokenizer(context: int = 24):
    """open_clip's tokenizer: list of texts → (n, context) ids. A scene's caption has 20 or fewer."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=context)


def class_embeddings(encode_text, tokenize, classes, templates, device="cpu") -> torch.Tensor:
    """(classes, dim) of unit norm: the mean over each class's prompts (Radford et al. 2021), as open_clip computes it.

    tokenize(list of str) gives ids (n, length), encode_text(ids) embeddings (n, dim) of any norm. templates: texts with
    {} for the class, or functions from class to prompt.
    """
    from open_clip import build_zero_shot_classifier

    tower = SimpleNamespace(encode_text=lambda ids, normalize: nn.functional.normalize(encode_text(ids).float(), dim=1))
    return build_zero_shot_classifier(tower, tokenize, list(classes), list(templates), device=device).T
