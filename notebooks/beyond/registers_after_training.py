"""The experiment of the notebook `registers_after_training`: its arms, their configurations, and a run of one.

Each configuration ("cell") adds registers to DeiT-Ti or ViT-Ti, in most arms by the recipe `vitreg train registers`. It
compares the model before and after on the same 100 labelled photos, none of which was used in training. An arm varies
one or a few options. workflow/twins.py runs the cells; the table has one row for each photo and cell.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import tempfile

import pandas as pd
import torch

import vitreg_lib as vr
from vitreg_lib.base import DATA
from vitreg_lib.hooks.anatomy import dissect
from vitreg_lib.hooks.capture import evaluating, hooks
from vitreg_lib.train import loop
from vitreg_lib.train.recipes import registers as recipe

TABLE = DATA / "sweeps" / "registers_after_training.parquet"
MODELS = ("deit-ti", "vit-ti")
CUTOFFS = {  # valleys in the histograms of log norms of the 100 photos, the same for all cells
    "deit-ti": 21.6,
    "vit-ti": 100.0,
}
DOSES = (0, 1, 2, 4, 8, 16)
SEEDS = (0, 1, 2)
CONTROLS = ("zeros", "mean", "other image", "noise")  # what replaces the trained registers before every block
MAIN = {"start": "outliers", "teacher": "ttr", "free": "all", "registers": 4}
ID = ("arm", "model", "registers", "start", "teacher", "free", "learning_rate", "steps")
ID += ("photos", "answer_weight", "seed", "control")
MEASURES = ("outliers_before", "outliers", "attention_on_outliers_before", "attention_on_outliers")
MEASURES += ("attention_on_registers", "answers_kl", "same_answer", "right_before", "right")
COLUMNS = (*ID, "photo", *MEASURES)  # of the table on disk


def cells() -> list[dict]:
    """All cells, the most important first: arm, model and the options that differ from the recipe's defaults."""
    found = [dict(arm="doses", model=m, registers=n, seed=s) for s in SEEDS for n in DOSES for m in MODELS]
    found += [
        dict(arm=arm, model=m, registers=n) for m in MODELS for arm in ("empty", "ttr") for n in (0, 1, 2, 4, 8, 16, 32)
    ]
    found += [
        dict(
            arm="grid",
            model=m,
            start=start,
            teacher=teacher,
            free=free,
            **({"learning_rate": 0.01} if free == "registers" else {}),
        )
        for m in MODELS
        for start in recipe.STARTS
        for teacher in recipe.TEACHERS
        for free in recipe.FREE
    ]
    found += [dict(arm="photos", model=m, photos=n, seed=s) for m in MODELS for n in (10, 50, 200, 0) for s in SEEDS]
    found += [
        dict(arm="steps", model=m, steps=n, learning_rate=rate)
        for m in MODELS
        for n in (25, 50, 100, 300, 1000)
        for rate in (1e-5, 3e-5, 1e-4)
    ]
    found += [
        dict(arm="answers", model=m, answer_weight=w, steps=n)
        for m in MODELS
        for w in (0.0, 1.0, 4.0, 16.0)
        for n in (100, 300)
    ]
    return found


def key(cell: dict) -> str:
    """A name for a cell's file."""
    return hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:16]


def run(cell: dict, data: str, report: str, device: str = "cpu", **options) -> pd.DataFrame:
    """The rows of one cell, one for each photo.

    data: training photos; report: labelled photos for the measurement; options: fields of TrainConfig for all cells.
    """
    torch.set_num_threads(1)
    model = vr.load(cell["model"], device)
    images = vr.images.load(report, model, 100)
    labels = vr.images.labels(images)
    if cell["arm"] in ("empty", "ttr"):
        return _untrained(cell, model, images, labels, data)
    given = {k: v for k, v in cell.items() if k != "arm"} | {"cutoff": CUTOFFS[cell["model"]]}
    given |= dict(data=data, report=report, eval_images=8, workers=0, save_every=10_000, telemetry_images=2)
    config, _ = loop.configure("registers", **given | options)
    with tempfile.TemporaryDirectory() as place:
        loop.train(config, recipe, place, device, progress=False)
        twin = vr.load(f"file:{place}/model.safetensors", device)
    source = recipe.source(config)
    where = dict(cutoff=source.found.cutoff, layer=source.found.layer, labels=labels)
    described = {name: getattr(config, name) for name in ID if name not in ("arm", "control")} | {"arm": cell["arm"]}
    described |= dict(
        cutoff=source.found.cutoff,
        model_sha256=model.sha256,
        twin_sha256=twin.sha256,
        photos_sha256=photos_digest(data),
    )
    before = vr.remedies.outputs_of(model, images, source.found.layer)
    tables = [_rows(vr.remedies.effect(before, twin, images, **where), images, described, "")]
    if cell["arm"] == "doses" and config.seed == 0 and config.registers == MAIN["registers"]:
        for how in CONTROLS:
            tables.append(
                _rows(
                    vr.remedies.effect(before, replaced(twin, images.x, how), images, **where), images, described, how
                )
            )
    return pd.concat(tables, ignore_index=True)


def _untrained(cell, model, images, labels, data) -> pd.DataFrame:
    """Rows for empty tokens or registers at test time; their neurons come from the training photos of the recipe."""
    config, _ = loop.configure("registers", model=cell["model"], data=data, cutoff=CUTOFFS[cell["model"]])
    found = recipe.source(config).found
    n = cell["registers"]
    if cell["arm"] == "empty":
        remedied = vr.mend.with_empty_tokens(model, n)
    else:
        remedied = vr.mend.with_test_time_registers(model, n, found.neurons)
    effects = vr.remedies.effect(model, remedied, images, found.cutoff, found.layer, labels)
    described = dict(cell, seed=0, steps=0, cutoff=found.cutoff, model_sha256=model.sha256, neurons=str(found.neurons))
    return _rows(effects, images, described, "")


def _rows(effects, images, described: dict, control: str) -> pd.DataFrame:
    return effects.round(4).astype("float32").assign(photo=images.names, **described, control=control)


def photos_digest(folder: str) -> str:
    """sha256 over the names and contents of all photos in a folder."""
    digest = hashlib.sha256()
    for path in vr.images.find(folder)[0]:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@torch.no_grad()
def replaced(model, x: torch.Tensor, how: str, seed: int = 0):
    """A copy of a model whose registers are replaced before every block, to test what they carry.

    how: "zeros"; "mean": the mean over the photos `x`, for each block; "other image": those of the next image in the
    batch; "noise": random directions of the same norm. Raises ValueError for another word.
    """
    if how not in CONTROLS:
        raise ValueError(f"unknown replacement {how!r}; known are {', '.join(CONTROLS)}")
    module = copy.deepcopy(model.module)
    anatomy = dissect(module)
    first, last = int(anatomy.has_cls), anatomy.num_prefix_tokens
    means = _mean_registers(model, x) if how == "mean" else {}
    generator = torch.Generator().manual_seed(seed)

    def replace(block: int):
        def hook(part, args, kwargs):
            tokens = args[0].clone()
            own = tokens[:, first:last]
            if how == "zeros":
                new = torch.zeros_like(own)
            elif how == "mean":
                new = means[block].to(own).expand_as(own)
            elif how == "other image":
                new = own.roll(1, 0)
            else:
                noise = torch.randn(own.shape, generator=generator).to(own)
                new = noise / noise.norm(dim=-1, keepdim=True) * own.norm(dim=-1, keepdim=True)
            tokens[:, first:last] = new
            return (tokens, *args[1:]), kwargs

        return hook

    for i, block in enumerate(anatomy.blocks):
        block.register_forward_pre_hook(replace(i), with_kwargs=True)
    return dataclasses.replace(model, module=module, name=f"{model.name}, registers: {how}", role="mended")


def _mean_registers(model, x: torch.Tensor) -> dict[int, torch.Tensor]:
    """{block: (registers, dim)}: the registers that enter each block, averaged over images."""
    anatomy, sums = model.anatomy, {}
    first, last = int(anatomy.has_cls), anatomy.num_prefix_tokens

    def hook(block):
        def keep(part, args):
            sums[block] = sums.get(block, 0) + args[0][:, first:last].sum(0)

        return keep

    pairs = [(block.register_forward_pre_hook, hook(i)) for i, block in enumerate(anatomy.blocks)]
    with evaluating(model.module), hooks(*pairs):
        for part in x.split(32):
            model.module.forward_features(part.to(model.weights))
    return {block: total / len(x) for block, total in sums.items()}
