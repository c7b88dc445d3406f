"""The tokens of Tables 1, 4 and 6: cls, registers, and patch tokens drawn by kind; kept on disk.

A token counts as an outlier by the cutoff of `vr.detect` (`cutoff_of`). Which tokens are drawn depends on seed and
image alone. `feature_cache` keeps the tokens, `base.remembered` the cutoffs.
"""

from __future__ import annotations

import dataclasses

import torch
from feature_cache import BATCH, Features, described, mapped, source_sha256
from verdicts import Judged, cutoff_after

from vitreg_lib.base import remembered
from vitreg_lib.data.scenes import uniform
from vitreg_lib.measure import detection, outliers
from vitreg_lib.model.planted import PAIRS
from vitreg_lib.probes.local import matched_normal

GROUPS = ("normal", "outlier", "matched")
CALIBRATION = 256  # images by whose norms a model's cutoff is chosen


def classification_tokens(
    model,
    source,
    cutoff: float,
    draws: int = 5,
    seed: int = 0,
    places: Features | None = None,
    progress: bool = False,
    seen: dict | None = None,
) -> Features:
    """Tokens after the final LayerNorm for probes of the whole image: cls, registers, and drawn patch tokens.

    Columns, for each image: cls (dim); mean (dim) of the patches; registers (registers, dim); norms (patches) before
    the final LayerNorm; is_outlier (patches): norms above `cutoff`, or those of `places`, the features of another model
    on the same images whose places are borrowed; and for each of `GROUPS` `draws` tokens (draws, dim) drawn at random
    with replacement among its members by (seed, row): normal ones, outliers, and `local.matched_normal` partners of
    outliers. Where a group has no member the tokens are zero and `has_GROUP` is False. A planted control also has
    `planted` (7), the part of cls that its outliers were made to carry. seen: batches that `cutoff_of` captured.
    """
    if places is not None and len(places) != len(source):
        raise ValueError(f"places of {len(places)} images do not fit {len(source)} images")
    about = described(model, source.digest, len(source)) | {
        "kind": "classification tokens",
        "cutoff": cutoff,
        "draws": draws,
        "seed": seed,
        "places": places.fingerprint if places else "own",
    }

    def extract(batch, rows):
        at = (seen or {}).pop((model.label, source.digest, int(rows[0])), None)
        if at is None:
            x, before = model.normalise(source.pixels(batch, model)), [model.onset - 1] if model.onset else []
            at = model.capture(x, ("norms", *_sites(model)), layers=[*before, model.anatomy.depth - 1])
        tokens, norms = at.final.float(), at.patch_norms[:, -1]
        patches = at.patches(tokens)
        mask = norms > cutoff if places is None else places.column("is_outlier", rows)
        if mask.shape != norms.shape:
            raise ValueError(f"places on {mask.shape[1]} patches do not fit the {norms.shape[1]} of {model.name}")
        partners = matched_normal(mask.unflatten(1, at.grid)).flatten(1)
        cls = tokens[:, 0] if at.has_cls else patches.mean(1)  # the mean stands in where there is no cls
        found = {"cls": cls, "mean": patches.mean(1), "norms": norms, "is_outlier": mask}
        if model.onset:
            found["planted"] = planted_content(model, at.tokens[model.onset - 1][:, 0])
        if at.num_registers:
            found["registers"] = tokens[:, at.registers]
        u = uniform(rows, len(GROUPS) * draws, seed).double().view(len(rows), len(GROUPS), draws)
        for number, (name, members) in enumerate(zip(GROUPS, (~mask, mask, partners), strict=True)):
            place = _drawn(members, u[:, number])
            drawn = patches.gather(1, place[..., None].expand(-1, -1, patches.shape[-1]))
            found[f"has_{name}"] = members.any(1)
            found[name] = drawn * members.any(1)[:, None, None]
        return found

    return mapped(source.rows, extract, about, progress)


def _sites(model) -> tuple[str, ...]:
    """What is captured for tokens, besides norms."""
    return ("final", "tokens") if model.onset else ("final",)


@torch.no_grad()
def planted_content(model, cls: torch.Tensor) -> torch.Tensor:
    """(n, 7) content of the planted `Model`'s outliers, from its cls tokens (n, dim) before the onset block.

    The weights that write it into the outliers compute it: the first seven values of the first head that was planted.
    """
    block, first = model.module.blocks[model.onset], 3 * model.module.embed_dim - 2 * PAIRS
    rows, qkv = slice(first, first + 7), block.attn.qkv
    return torch.nn.functional.linear(block.norm1(cls.to(model.device)), qkv.weight[rows], qkv.bias[rows]).cpu()


def cutoff_of(model, source, seen: dict | None = None) -> float:
    """The norm at the output above which tokens are artifacts, by `vr.detect` on the first images of a source.

    Infinite where the answer is not "artifacts". Where an earlier block was judged, the output's own norms decide.
    seen: what was captured is put there for `classification_tokens`, by model, source and first row of the batch.
    """
    n, seen = min(CALIBRATION, len(source)), {} if seen is None else seen

    def found() -> float:
        parts = []
        for i in range(0, n, BATCH):
            x = model.normalise(source.pixels(source.rows[i : min(i + BATCH, n)], model))
            part, at = detection.observe_batch(model, x, _sites(model))
            parts.append(part)
            seen[model.label, source.digest, i] = dataclasses.replace(at, attention={})
        observed = detection.join(parts)
        answer, last = detection.judge(observed), model.anatomy.depth - 1
        return cutoff_after(Judged.of(answer), last, observed.norms[:, last]) if answer.has_artifacts else float("inf")

    code = source_sha256(detection.__file__, outliers.__file__)
    return remembered(described(model, source.digest, n) | {"kind": "cutoff", "rule": code}, found)


def _drawn(members: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """(images, draws) positions of members (images, patches), picked by u (images, draws) in [0, 1); 0 without any."""
    rank = members.long().cumsum(1)  # the k-th member is the first place whose rank is k
    count = rank[:, -1:]
    wanted = (u * count).long().clamp(max=(count - 1).clamp_min(0)) + 1
    return torch.searchsorted(rank, wanted).clamp_max(members.shape[1] - 1)
