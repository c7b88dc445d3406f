"""Look inside vision transformers: the library behind the notebooks of 'Vision Transformers Need Registers'.

    import vitreg_lib as vr

    run = vr.start("fig04", globals())         # in a notebook: parameters, folder and record of this run
    model = vr.load("mini-deit3")              # any name of `vitreg models`, timm:…, file:…, random:…
    images = vr.images.load("scenes", model)
    captured = vr.capture(model, images, "norms")  # norms, tokens, q, k, v, attention rows at chosen layers

A module is imported when it is first used; `dir(vr)` lists what there is.
"""

import importlib

__version__ = "0.1.0"
SHORT = {  # what `vr.NAME` stands for: a function (module:name) or a module
    "start": "record.run:start",
    "load": "model.zoo:load",
    "capture": "model.zoo:capture",
    "describe": "hooks.anatomy:describe",
    "detect": "measure.detection:detect",
    "anatomy": "hooks.anatomy",
    "outliers": "measure.outliers",
    "detection": "measure.detection",
    "attention": "measure.attention",
    "maps": "measure.maps",
    "objects": "measure.objects",
    "pairs": "measure.pairs",
    "places": "measure.places",
    "images": "data.images",
    "scenes": "data.scenes",
    "sets": "data.sets",
    "zoo": "model.zoo",
    "mend": "model.mend",
    "saved": "model.saved",
    "remedies": "model.remedies",
    "planted": "model.planted",
    "linear": "probes.linear",
    "local": "probes.local",
    "telemetry": "train.telemetry",
    "plots": "plots",
    "widgets": "widgets",
    "record": "record.run",
    "diagnose": "record.diagnose:diagnose",
    "measured": "model.measured",
}


def __getattr__(name: str):
    if name not in SHORT:
        raise AttributeError(f"vitreg_lib has no {name!r}; it has {', '.join(SHORT)}")
    module, _, function = SHORT[name].partition(":")
    owner = importlib.import_module(f".{module}", __name__)
    return getattr(owner, function) if function else owner


def __dir__() -> list[str]:
    return sorted([*SHORT, "__version__"])
