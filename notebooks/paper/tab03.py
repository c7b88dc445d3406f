"""Table 3: its verdicts."""

from __future__ import annotations

from vitreg_lib.measure import objects

NEEDS = ("DeiT-III-B", "OpenCLIP B/16", "DINOv2-L")  # the models of claims C095 to C103, three data sets each


def claims(models, table, hits: dict, baselines: dict, pairs: dict[str, str]):
    """Arguments of `Run.claim`: C095 to C107, which need the paper's models, then ours.

    table: CorLoc by (model, feature, bias); hits: {label: {(feature, bias): (images,) bool}}; baselines: `corloc` of
    boxes that know nothing of the image.
    """
    why = "needs {} with and without registers, on its own data set; the pairs that are at hand are judged below"
    for number in range(95, 104):
        yield f"C{number:03d}", None, why.format(NEEDS[(number - 95) // 3])
    yield "C104", None, why.format("each of the three models")
    yield "C105", None, "needs DINOv2-L with registers and DINO on VOC 2007"
    for claim in ("C106", "C107"):
        yield claim, None, "needs OpenCLIP beside DeiT-III and DINOv2 on VOC 2007"
    for name, base in pairs.items():
        for feature in ("values", "keys"):
            points, low, high = objects.gain(hits[base][feature, 0.0], hits[name][feature, 0.0])
            text = f"with registers ({name}) LOST on {feature} finds more objects than without"
            measured = f"{points:+.1f} points ({low:+.1f} to {high:+.1f}), bias 0"
            yield f"ours-{name}-{feature}", low > 0, measured, text, "none"
    free = {name: found.hits for name, found in baselines.items()}
    for model in (m for m in models if m.role == "random control"):
        free |= {f"{model.label}, {f}, bias {b:g}": found for (f, b), found in hits[model.label].items()}
    best = max(free, key=lambda name: free[name].double().mean())
    for name in (m.label for m in models if m.role != "random control"):
        feature, bias = table.loc[name].corloc.idxmax()
        points, low, high = objects.gain(free[best], hits[name][feature, bias])
        measured = f"{feature}, bias {bias:g}: {table.corloc[name, feature, bias]:.0%}; {points:+.0f} points "
        measured += f"({low:+.0f} to {high:+.0f}) to {best}: {free[best].double().mean():.0%}"
        text = f"the best of the four settings of {name} beats the best baseline, random weights among them"
        yield f"baseline-{name}", low > 0, measured, text, "none"
