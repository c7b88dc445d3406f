"""Table 3: the verdicts on object discovery."""

from __future__ import annotations

from verdicts import above

from vitreg_lib.measure import objects, pairs

NEEDS = "needs {} with and without registers, on its own data set; the pairs of models that are here are judged below"


def claims(models, hits: dict, baselines: dict, having):
    """Arguments of `Run.claim`: C095 to C107, which need the paper's models, then ours on the models that are here.

    hits: {label: {(feature, bias): (images,) bool}}; baselines:
    {name: `CorLoc`}; having: labels of models with artifacts.
    """
    for number in range(95, 104):
        yield f"C{number:03d}", None, NEEDS.format(("DeiT-III-B", "OpenCLIP B/16", "DINOv2-L")[(number - 95) // 3])
    yield "C104", None, NEEDS.format("each of the three models")
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
                yield f"ours-{name}-{feature}", None, f"{base} has no artifacts to remove ({measured})", text, "none"
    free = {name: each.hits for name, each in baselines.items()}
    for label in (m.label for m in models if m.role == "random control"):
        free |= {f"{label}, {f}, bias {b:g}": found for (f, b), found in hits[label].items()}
    best = max(free, key=lambda name: free[name].double().mean())
    for name in (m.label for m in models if m.role != "random control"):
        (feature, bias), found = chosen_elsewhere(hits[name])
        gain, low, high = objects.gain(free[best], found)
        measured = (
            f"{feature}, bias {bias:g}, chosen on other images: {found.double().mean():.0%}; {gain:+.0f} points "
            f"({low:+.0f} to {high:+.0f}) to {best}: {free[best].double().mean():.0%}"
        )
        text = f"one of the four settings of {name} beats the best baseline, random weights among them"
        yield f"baseline-{name}", above(low, high), measured, text, "none"


def chosen_elsewhere(hits: dict) -> tuple[tuple, object]:
    """(the setting with most hits on the even images, hits (images,)): each half is scored as the other one chose.

    The best of several settings on the same images would be too good.
    """
    settings = list(hits)
    choose = [max(settings, key=lambda s, start=start: hits[s][start::2].double().mean()) for start in (0, 1)]
    scored = hits[choose[0]].clone()
    scored[::2] = hits[choose[1]][::2]
    return choose[0], scored
