"""Zero-shot classification by a pair of image and text tower (Table 2b): the class whose prompts are nearest.

A class is the mean of the embeddings of its prompts, each of length one, made of length one again (Radford
et al. 2021; open_clip does the same). Nothing is trained.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

TEXTS = 256  # encoded at once


@torch.no_grad()
def class_embeddings(encode_text, tokenize, classes, templates, device="cpu") -> Tensor:
    """(classes, dim) of length one: the mean over each class's prompts, for any pair of tokenizer and text encoder.

    tokenize(list of str) gives token ids (n, length), encode_text(ids) embeddings (n, dim) of any length. templates:
    texts with {} for the name, or functions from name to prompt as open_clip's are. Raises ValueError for no class or
    no template, and for embeddings that are not finite.
    """
    classes, templates = list(classes), list(templates)
    if not classes or not templates:
        raise ValueError(f"{len(classes)} classes and {len(templates)} templates: at least one of each is needed")
    texts = [t.format(c) if isinstance(t, str) else t(c) for c in classes for t in templates]
    parts = [encode_text(tokenize(texts[i : i + TEXTS]).to(device)) for i in range(0, len(texts), TEXTS)]
    embedded = torch.cat(parts).float()
    if not torch.isfinite(embedded).all():
        bad = int((~torch.isfinite(embedded).all(1)).nonzero()[0])
        raise ValueError(f"the embedding of the prompt {texts[bad]!r} holds NaN or infinite values")
    return normalize(normalize(embedded, dim=1).unflatten(0, (len(classes), -1)).mean(1), dim=1)
