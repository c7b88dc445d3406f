"""Look inside vision transformers: the library behind the notebooks of 'Vision Transformers Need Registers'.

    import vitreg_lib as vr

    run = vr.start("fig04", globals())     # in a notebook: parameters, folder and record of this run
    model = vr.load("mini-deit3")          # any name of `vitreg models`, timm:…, file:…, random:…
    seen = model.capture(images, "norms")  # norms, tokens, q, k, v, attention rows at chosen layers

Modules are imported when first used: `vr.outliers`, `vr.plots`, `vr.widgets` …
"""

import importlib

__version__ = "0.1.0"
_SHORT = {"start": "record", "load": "models.zoo"}  # functions at hand without their module's name
_NESTED = {  # modules at hand by their last name
    "images": "data.images",
    "registry": "data.registry",
    "tasks": "data.tasks",
    "token_claims": "probes.token_claims",
    "tokens": "probes.tokens",
    "scenes": "data.scenes",
    "telemetry": "train.telemetry",
    "emergence": "train.emergence",
    "sweep": "train.sweep",
    "zoo": "models.zoo",
    "planted": "models.planted",
}


def __getattr__(name: str):
    if name in _SHORT:
        return getattr(importlib.import_module(f".{_SHORT[name]}", __name__), name)
    try:
        return importlib.import_module(f".{_NESTED.get(name, name)}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"vitreg_lib has no {name!r}") from None
