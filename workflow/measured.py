"""Write data/measured/: measurements of real models, which the default figures replay if the weights are missing.

python workflow/measured.py                  # all models of MODELS
python workflow/measured.py deit-ti vit-ti   # some of them

VITREG_MODELS must name a folder with the weights and the labelled photos. Each file has the output of `vitreg measure`.
For some models it also has the data of single notebooks: LOST's maps and the gain of the value projection (Figures 13
and 14), features of a few tokens of labelled photos (Tables 1, 4 and 6), and the contribution of each test image to the
score of a task (Table 2, Figure 8).
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vitreg_lib.base import NOTEBOOKS, commit  # noqa: E402
from vitreg_lib.data import images, sets  # noqa: E402
from vitreg_lib.measure import detection, objects  # noqa: E402
from vitreg_lib.model import measured, zoo  # noqa: E402

sys.path.insert(0, str(NOTEBOOKS / "paper"))
import fig09  # noqa: E402
import fig14  # noqa: E402
import tab02  # noqa: E402
import tab03  # noqa: E402
import tables_tasks  # noqa: E402
import tables_tokens  # noqa: E402
import verdicts  # noqa: E402

PHOTOS = 10
TRAIN, TEST, DRAWS = 160, 100, 2  # labelled photos of each split, tokens of each kind per photo
SCORES = dict(classification="caltech101-small", dense="camvid-small", depths="", n_train=240, n_test=160)
DEPTHS = SCORES | dict(depths="scenes")  # DeiT-Ti has no artifacts on scenes
CALTECH, BOTH = ("caltech101-small",), ("caltech101-small", "cifar10-small")
# the additional data of each file: all late blocks, LOST's maps, scores of tasks, labelled sets and kinds of tokens
OUTLIERS, REGISTERS = ("cls", "normal", "outlier", "matched"), ("cls", "normal", "registers")
MODELS = {
    "deit-ti": dict(late=True, lost=True, scores=SCORES, sets=CALTECH, tokens=OUTLIERS),
    "deit-ti-trained-reg1": dict(scores=SCORES, sets=CALTECH, tokens=REGISTERS),
    "deit-ti-trained-reg2": dict(scores=SCORES),
    "deit-ti-trained-reg4": dict(late=True, lost=True, scores=SCORES),
    "deit-ti-trained-reg8": dict(scores=SCORES),
    "deit-ti-trained-reg16": dict(scores=SCORES),
    "deit-ti+ttr4": {},
    "deit-ti+empty4": {},
    "vit-ti": dict(late=True, lost=True, scores=DEPTHS, sets=BOTH, tokens=OUTLIERS),
    "vit-ti-trained-reg4": dict(late=True, lost=True, scores=DEPTHS),
    "vit-ti+ttr4": dict(late=True),
    "dinov2-s": {},
}


def main(names: list[str]) -> None:
    """Measure the models of these names; without names, all models."""
    state = commit()  # before the first file is written, since that is a change for git
    for name in names or MODELS:
        write(name, state, **MODELS[name])


def write(name: str, state: str, late=False, lost=False, scores=None, sets=(), tokens=()) -> None:
    """Measure one model and write its file."""
    model = zoo.load(name, "cpu")
    pictures = images.load("photos", model, PHOTOS)
    tensors, more = measured.measure(model, pictures, last=not late), {"commit": state}
    if lost:
        tensors |= discovery(model, pictures)
        scored, more["lost"] = on_boxes(model)
        tensors |= scored
    if scores:
        found = tab02.scores(model, **scores)
        tensors |= {
            f"scores.{task}": parts if task == "rmse" else parts.to(torch.int32) for task, parts in found.parts.items()
        }
        more |= {"scores": found.sources, "scored_artifacts": found.artifacts}
    if model.role == "trained" and model.registers > 1:
        more["copies"] = verdicts.copies(model)
    if sets:
        more["sets"] = {}
        for problem in tables_tasks.load(" ".join(sets), TRAIN, TEST):
            columns, more["sets"][problem.name] = labelled(model, problem, tokens)
            tensors |= columns
    path = measured.FOLDER / f"{name}.safetensors"
    measured.write(model, pictures, tensors, path, f"python workflow/measured.py {name}", **more)
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB", flush=True)


def discovery(model, pictures) -> dict[str, torch.Tensor]:
    """LOST's maps of the last block on queries, keys and values, and the gain of the value projection."""
    seen, found = model.capture(pictures, ("q", "k", "v"), layers=-1), {}
    for site in "qkv":
        result = objects.lost(objects.features(seen, site), seen.grid, normalize=True, intermediates=True)
        maps = dataclasses.asdict(result) if site == "v" else {"expansion": result.expansion}
        found |= {f"lost.{site}.{key}": value for key, value in maps.items()}
    return found | {"value_gain": fig14.value_gain(model, pictures)}


def on_boxes(model) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, facts) of LOST on photos with boxes (Table 3), and of the registers' attention to objects (Fig. 9).

    The fact `answer` is the detector's answer on the same photos.
    """
    pictures, truth = sets.load_boxes("coco", model)
    table, hits = tab03.discover(model, pictures, truth, (0.0, -0.5))
    tensors = {"hits": torch.stack(list(hits.values()))}
    if model.registers:
        tensors["objects"] = fig09.object_mass(model, pictures, fig09.box_masks(truth, pictures.x.shape[-2:]))
    plain = {name: [each.value, each.low, each.high] for name, each in tab03.plain(pictures, truth).items()}
    facts = {"table": table.reset_index().to_dict("list"), "of": ["coco", pictures.source], "plain": plain}
    return tensors, facts | {"answer": detection.detect(model, pictures).answer}


def labelled(model, problem, tokens) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors by name, facts) of a few tokens of labelled photos.

    A model with registers is measured at the outlier places of the same model without registers.
    """
    base = zoo.load(model.base, "cpu") if model.base else model
    cut, task = tables_tokens.cutoff_of(base, problem.train), problem.tasks[0]
    facts = dict(about=task.about, metric=task.metric, classes=task.classes, owner=base.label)
    facts["cutoff"] = cut if cut < float("inf") and base is model else None
    columns = {}
    for split in ("train", "test"):
        source = getattr(problem, split)
        part = places = tables_tokens.classification_tokens(base, source, cut, DRAWS)
        if base is not model:
            part = tables_tokens.classification_tokens(model, source, cut, DRAWS, places=places)
        facts[split] = [part.fingerprint, {k: v for k, v in part.about.items() if v != float("inf")}]
        kept = [*tokens, *(f"has_{group}" for group in tables_tokens.GROUPS)]
        columns |= {f"set.{problem.name}.{split}.{name}": part.column(name) for name in kept}
        columns[f"set.{problem.name}.{split}.labels"] = getattr(task, split)
    facts["share"] = part.column("is_outlier").double().mean().item()  # of the test photos' tokens
    return columns, facts


if __name__ == "__main__":
    main(sys.argv[1:])
