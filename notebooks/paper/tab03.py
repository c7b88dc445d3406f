"""Table 3: LOST, baseline boxes that do not depend on the image's content, their figure, and the verdicts."""

from __future__ import annotations

import pandas as pd
import torch
from matplotlib.figure import Figure
from verdicts import WORDS, above, cured, every, judged, within

from vitreg_lib import plots
from vitreg_lib.measure import objects, pairs
from vitreg_lib.plots.style import PAPER, styled

NEEDS = "needs {} with and without registers and artifacts, on {}"
SETS = ("VOC 2007", "VOC 2012", "COCO 20k")  # claims C095 to C103, by family
FAMILIES = {"deit3": "values", "clip": "values", "dinov2": "keys"}  # and the features that the paper takes
ANSWERS = {  # of the detector, where it did not find artifacts
    "none": "the detector finds no artifacts of {} on these images",
    "undecided": "the detector is undecided whether {} has artifacts on these images",
}
PART_OF = {"voc2007": "VOC 2007", "voc2012": "VOC 2012", "coco20k": "COCO 20k", "coco": "COCO 20k"}


def discover(model, pictures, truth: list, biases, normalize: bool = True):
    """`objects.sweep` of LOST on keys and values of the last block. A replayed model has stored results."""
    if model.replayed:
        table = pd.DataFrame(model.measured["lost"]["table"]).set_index(["feature", "bias"])
        return table, {key: hits.bool() for key, hits in zip(table.index, model.kept("hits"), strict=True)}
    seen = model.capture(pictures, ("k", "v"), layers=-1)
    features = {kind: objects.features(seen, kind[0]) for kind in ("keys", "values")}
    return objects.sweep(features, seen.grid, truth, model.anatomy.patch_size, biases, normalize=normalize)


def plain(pictures, truth: list) -> dict[str, objects.CorLoc]:
    """{name: `CorLoc`} of two boxes that do not depend on the image's content."""
    sizes = torch.tensor([pictures.x.shape[-2:]] * len(pictures))
    boxes = {
        "whole image": objects.centred_boxes(sizes, 1.0),
        "centred box, half the area": objects.centred_boxes(sizes),
    }
    return {name: objects.corloc(guess, truth) for name, guess in boxes.items()}


@styled
def draw(table: pd.DataFrame, lines: dict[str, dict[str, float]]) -> Figure:
    """CorLoc (%) of every model and setting; in each model's column, lines for the baselines on its own images.

    table: see `plots.scores`. lines: {label: {baseline: %}}.
    """
    figure = plots.scores(table, "CorLoc (%)", {})
    (axis,) = figure.axes
    for place, values in enumerate(lines.values()):
        for style, (name, value) in zip(("--", ":"), values.items(), strict=True):
            axis.hlines(value, place - 0.45, place + 0.45, PAPER, style, lw=1.2, label=None if place else name)
    figure.legends[0].remove()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def answer(model, pictures) -> str:
    """The detector's answer on the images that LOST was scored on."""
    return model.measured["lost"]["answer"] if model.replayed else judged(model, pictures).answer


def where(run, model, pictures) -> tuple[str, str]:
    """(name of the set, description of the images) on which LOST was scored with this model."""
    return tuple(model.measured["lost"]["of"]) if model.replayed else (run.at.images, pictures.source)


def claims(models, hits: dict, baselines: dict, answers: dict[str, str], scored_on: dict):
    """Yields the arguments of `Run.claim`: C095 to C107 on the pairs that can be judged, by family; then ours.

    The features of a family are those of the paper; the bias is 0, because the paper's is not published. hits: {label:
    {(feature, bias): (images,) bool}}; baselines: {name: `CorLoc`} on the images of the models that are not replayed;
    answers: `answer`, by label; scored_on: `where`, by label.
    """
    having, cells = {name for name, each in answers.items() if each == "artifacts"}, {}
    for number, (family, kind) in enumerate(FAMILIES.items()):
        chosen = cured(models, having, family)[0]
        chosen = {n: b for n, b in chosen.items() if n in hits and b in hits}
        cells |= {n: objects.gain(hits[b][kind, 0.0], hits[n][kind, 0.0]) for n, b in chosen.items()}
        for place, name in enumerate(SETS):
            here = [n for n in chosen if PART_OF.get(scored_on[n][0]) == name]
            verdicts = [_as_reported(family, *cells[n]) for n in here]
            text = f"{kind}, bias 0, {scored_on[here[0]][1] if here else ''}: {_in_words({n: cells[n] for n in here})}"
            missing = NEEDS.format(f"a model {WORDS[family]}", name)
            yield f"C{95 + 3 * number + place:03d}", every(verdicts), text if here else missing
    verdict = every(above(low, high) for _, low, high in cells.values())
    text = f"{_in_words(cells)}; a gain in all of them would be {len(cells)} of the paper's 9 cells"
    yield "C104", None if verdict is True else verdict, text if cells else NEEDS.format("a model", "a set with boxes")
    yield "C105", None, "needs DINOv2-L with registers and DINO on VOC 2007"
    for claim in ("C106", "C107"):
        yield claim, None, "needs OpenCLIP beside DeiT-III and DINOv2 on VOC 2007"
    for name, base in pairs.pairs(models).items():
        for feature in ("values", "keys"):
            gain, low, high = objects.gain(hits[base][feature, 0.0], hits[name][feature, 0.0])
            text = f"with registers ({name}) LOST on {feature} finds more objects than without"
            measured = f"{gain:+.1f} points ({low:+.1f} to {high:+.1f}), bias 0"
            if base in having:
                yield f"ours-{name}-{feature}", above(low, high), measured, text, "none"
            else:
                why = ANSWERS[answers[base]].format(base)
                yield f"ours-{name}-{feature}", None, f"{why} ({measured})", text, "none"
    free = {name: each.hits for name, each in baselines.items()}
    for label in (m.label for m in models if m.role == "random control"):
        free |= {f"{label}, {f}, bias {b:g}": found for (f, b), found in hits[label].items()}
    best = max(free, key=lambda name: free[name].double().mean())
    for name in (m.label for m in models if m.role != "random control" and not m.replayed):
        (feature, bias), found = chosen_elsewhere(hits[name])
        gain, low, high = objects.gain(free[best], found)
        measured = (
            f"{feature}, bias {bias:g}, chosen on other images: {found.double().mean():.0%}; {gain:+.0f} points "
            f"({low:+.0f} to {high:+.0f}) to {best}: {free[best].double().mean():.0%}"
        )
        text = f"one of the four settings of {name} beats the best baseline, random weights among them"
        yield f"baseline-{name}", above(low, high), measured, text, "none"


def _as_reported(family: str, gain: float, low: float, high: float) -> bool | str:
    """Does a gain in points agree with the paper's table: above 5, or for OpenCLIP between -6 and +1?"""
    return within(low, high, 3.5, -2.5) if family == "clip" else above(low, high, 5)


def _in_words(gains: dict) -> str:
    return "; ".join(
        f"{name} {gain:+.1f} points ({low:+.1f} to {high:+.1f})" for name, (gain, low, high) in gains.items()
    )


def chosen_elsewhere(hits: dict) -> tuple[tuple, object]:
    """(the setting with most hits on the even images, hits (images,)), each half scored with the other half's setting.

    If the setting were chosen on the scored images, the score would be too high.
    """
    settings = list(hits)
    choose = [max(settings, key=lambda s, start=start: hits[s][start::2].double().mean()) for start in (0, 1)]
    scored = hits[choose[0]].clone()
    scored[::2] = hits[choose[1]][::2]
    return choose[0], scored
