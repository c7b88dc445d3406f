"""The answers of the workshop, one a section. `workflow/workshop.py` fills them into the exercise notebooks.

A section replaces the cell tagged `answer:NAME` of the exercises, so it can use the variables of the notebook.
"""

# ruff: noqa: F821, E402
import torch

# %% patch_norms


def patch_norms(tokens, num_prefix_tokens):
    return tokens[:, num_prefix_tokens:].norm(dim=-1)


# %% onset

onset = int(norms.amax((0, 2)).diff().argmax()) + 1  # where the largest norm jumps; or by eye

# %% cutoff


def cutoff(norms):
    return 4 * norms.median()  # outliers are said to have ten times the norm of others


# %% attention_row


def attention_row(q, k):
    scores = (k @ q[:, :, None])[:, :, 0] / q.shape[-1] ** 0.5
    return scores.softmax(-1)


# %% share

patches = rows[..., model.anatomy.num_prefix_tokens :]  # without cls
share = (patches * is_outlier[:, None]).sum(-1).mean()

# %% head

head = int((patches * is_outlier[:, None]).sum(-1).mean(0).argmax())  # or by eye, in the explorer

# %% split


def split(image_ids):
    ids = image_ids.unique()
    return torch.isin(image_ids, ids[: len(ids) // 5])  # a fifth of the images


# %% partner


def partner(is_outlier, row, col):
    normal = (~is_outlier).nonzero()
    distance = (normal - torch.tensor([row, col])).square().sum(1)
    return tuple(normal[distance.argmin()].tolist())


# %% fit

fit = "own"

# %% add_registers


def add_registers(x, registers):
    return torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], 1)


# %% patch_mean


def patch_mean(x, num_registers):
    return x[:, 1 + num_registers :].mean(1)


# %% left

left = (after > limit).double().mean() / (before > limit).double().mean()

# %% iou


def iou(a, b):
    width, height = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp_min(0)
    overlap = width * height
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return overlap / (area_a + area_b - overlap)


# %% seed


def seed(features):
    degrees = (features @ features.T >= 0).sum(1)
    return degrees.argmin()


# %% gain

gain = 100 * (hits[with_registers].double().mean() - hits[without].double().mean())
