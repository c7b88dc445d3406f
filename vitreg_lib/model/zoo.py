"""Models by name, ready to be measured.

mini-deit3, vit-ti …      an entry of data/models.yaml
planted, mini-random      the two controls, entries too
timm:NAME, or NAME alone  a model of timm: VITREG_MODELS first, then the hub's cache, then the hub
file:PATH                 weights in any layout that `weights` recognises, or a folder in timm's hub layout;
                          file:PATH#ARCH names its architecture in timm; file:RUN is the model of a training run
hf:REPO                   a model of transformers: a name of the hub's, or a folder of `save_pretrained`
open_clip:ARCH/TAG        the image tower of a model of open_clip's; TAG may be a file
random:NAME               the same architecture with fresh weights: a control
NAME+ttrN                 any of them with N registers added at test time (see `mend`)
NAME+emptyN               with N tokens of zeros and nothing else changed
NAME+minusN               without the N directions of patch tokens in which places differ most
"""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from ..base import CHECKPOINTS, UserError, hub, line, unknown
from . import added, saved
from .model import FACTS, Model, weights_sha256, with_facts
from .names import available, config, damaged, entries, file_parts, folder, in_hub_layout, made, split
from .outside import create, of_module, of_open_clip, of_transformers
from .weights import (
    Layout,
    file_sha256,
    fill,
    is_safetensors,
    read_weights,
    recognise,
    torchvision_vit,
)

__all__ = ["FACTS", "available", "capture", "entries", "folder", "load", "split", "with_facts"]


def load(
    name: str | nn.Module | Model,
    device: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    weights: str = "ema",
    **preprocessing,
) -> Model:
    """The model of that name, in evaluation mode, on `device` (CUDA where there is one, by default).

    The user's own module, described (`vr.describe`) or recognised, becomes a `Model` on its own device, with its stated
    preprocessing or else ImageNet's. `image_size`, a side or (height, width), replaces the model's input size; position
    embeddings are interpolated. weights: "ema" or "raw", where a file holds both, or "torchscript" for a file of
    torch.jit, which can run code. `preprocessing` (mean, std, crop, crop_mode, interpolation) replaces the model's own.
    Raises UserError for an unknown name, unavailable weights, or a damaged file.
    """
    if not isinstance(name, str):
        model = name if isinstance(name, Model) else of_module(name)
        preprocessing |= {"input_size": image_size} if image_size else {}
        return dataclasses.replace(model, **preprocessing) if preprocessing else model
    base, kind, number = split(name)
    if kind:
        from . import mend

        model = mend.with_added(load(base, device, image_size, weights, **preprocessing), kind, number)
        model.label = name
        return model
    where, _, rest = base.partition(":")
    if where == "random":
        model = _random(base, image_size)
    elif where == "file":
        model = _file(base, image_size, weights)
    elif where == "hf":
        model = of_transformers(base, rest, image_size)
    elif where == "open_clip":
        model = of_open_clip(base, rest, image_size)
    elif base in entries():
        model = _entry(base, image_size)
    elif Path(base).exists():
        raise UserError(f"{base} is a file or folder here: write file:{base}")
    else:
        model = _timm(base, base.removeprefix("timm:"), image_size)
    model.label = base
    model.module.eval().requires_grad_(False)
    model.module.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return dataclasses.replace(model, **preprocessing)


def capture(model, images, keep="norms", **options):
    """`hooks.capture.capture` of a model's name, a `Model`, or a module of one's own, on normalised images or `Images`.

    captured = vr.capture("mini-deit3", images, ("norms", "attention"), layers=-1)
    """
    return load(model).capture(images, keep, **options)


def _entry(name: str, image_size: int | None) -> Model:
    entry = entries()[name]
    if "timm" in entry:
        model = _timm(name, entry["timm"], image_size or entry.get("input_size"))
    elif "random" in entry:
        model = dataclasses.replace(_random(f"random:{entry['random']}", image_size), name=name)
    elif "file" in entry:
        model = with_facts(saved.read(name, _shipped(name, entry), image_size), entry, name)
    else:
        model = _file(f"file:{_made(name, entry)}", image_size, "ema")
        model = dataclasses.replace(with_facts(model, entry, name), name=name)
    model.about = entry.get("about", "")
    return model


def _shipped(name: str, entry: dict) -> Path:
    path = CHECKPOINTS / entry["file"]
    sha256 = file_sha256(path) if path.exists() else ""
    if sha256 != entry["sha256"]:
        wrong = f"is damaged or not the shipped one (sha256 {sha256[:12]}…, expected {entry['sha256'][:12]}…)"
        raise UserError(
            f"{name}: data/checkpoints/{path.name} {wrong if sha256 else 'is not here'}; `git checkout -- "
            "data/checkpoints` restores it"
        )
    return path


def _made(name: str, entry: dict) -> Path:
    path = made(name)
    if path is None:
        raise UserError(
            f"{name}: its weights are made here, from those of {entry['base']}: `{entry['made_by']} --only {name}`; "
            f"or put a folder {name} with its model.safetensors into one named by VITREG_MODELS"
        )
    return path


def _random(name: str, image_size: int | None) -> Model:
    inner = name.removeprefix("random:")
    entry = entries().get(inner, {})
    with torch.random.fork_rng(devices=[]):  # the CPU's state alone: torch.manual_seed would reach into CUDA
        torch.default_generator.manual_seed(0)
        if "file" in entry:
            model = _entry(inner, image_size)
            model.module.init_weights("")
        else:
            architecture = entry.get("timm", inner.removeprefix("timm:"))
            image_size = image_size or entry.get("input_size")
            model = of_module(create(architecture, image_size, pretrained=False), name, "", image_size)
    base = f"random:{entry['base']}" if "base" in entry else ""
    facts = dict(role="random control", entry=inner if entry else "", family="", base=base, onset=None)
    facts |= dict(name=name, about="", registers_from="random" if model.registers else "none")
    return dataclasses.replace(model, **facts, sha256=weights_sha256(model.module))


def _timm(name: str, timm_name: str, image_size: int | None) -> Model:
    label, entry = next((each for each in entries().items() if each[1].get("timm") == timm_name), ("", {}))
    place = folder(timm_name)
    if place:
        return with_facts(_hub_folder(timm_name, place, image_size), entry, label)
    instead = damaged() + (
        f"put a folder with config.json and model.safetensors from the hub's timm/{timm_name} into a folder named by "
        "VITREG_MODELS, or use --profile mini, which works offline"
    )
    with hub(f"{name}: its weights", instead):
        module = create(timm_name, image_size, pretrained=True)
    return with_facts(of_module(module, timm_name, "", image_size), entry, label)


def _hub_folder(name: str, folder: Path, image_size: int | None) -> Model:
    weights, stated = folder / "model.safetensors", config(folder)
    if not stated:
        raise UserError(f"{name}: config.json in {folder.name} cannot be read")
    if not weights.exists():
        raise UserError(f"{name}: {folder.name} has a config.json but no model.safetensors")
    try:
        module = create(f"local-dir:{folder}", image_size, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # safetensors and timm raise many kinds for damaged files
        raise UserError(f"{name}: model.safetensors in {folder.name} cannot be read: {line(error)}") from error
    module.timm_config = {"model_args": stated.get("model_args", {})}
    return of_module(module, name, file_sha256(weights), image_size)


def _file(name: str, image_size: int | None, which: str) -> Model:
    path, architecture = file_parts(name)
    if in_hub_layout(path):
        return _hub_folder(name, path, image_size)
    path = path / "model.safetensors" if path.is_dir() else path  # of a training run
    if not path.is_file():
        raise UserError(f"{name}: no such file, and no folder with a model.safetensors")
    if is_safetensors(path) and (model := saved.read(name, path, image_size)):
        return model
    tensors, taken = read_weights(path, which)
    additions, tensors = added.of_state(tensors)
    try:
        layout, tensors = recognise(tensors)
    except UserError as error:
        if not architecture:
            raise UserError(f"{name}: {error}; file:PATH#ARCH names an architecture of timm's") from None
        layout = Layout("timm's", architecture, {}, {})
    if layout.architecture == "torchvision" and not architecture:
        module = torchvision_vit(name, tensors, image_size)
    else:
        module = _in_timm(name, architecture or layout.architecture, layout.options, tensors, image_size)
    module = added.with_additions(module, additions) if additions else module
    model = of_module(module, name, file_sha256(path), image_size)
    stated = {} if "." in architecture else layout.preprocessing  # a tag of timm's says its own
    about = f"weights in the layout {layout.name}" + (f", of {taken}" if taken else "")
    return dataclasses.replace(model, about=about, **stated)


def _in_timm(name: str, architecture: str, options: dict, tensors, image_size: int | None) -> nn.Module:
    import timm

    if not timm.is_model(architecture.partition(".")[0]):
        if name.endswith(f"#{architecture}"):
            raise unknown("architecture of timm's", architecture, timm.list_models("*vit*"))
        raise UserError(
            f"{name}: the file does not say its architecture, and no usual one is like it: write {name}#ARCH with a "
            "name of timm's"
        )
    module = create(architecture, image_size, pretrained=False, **options)
    fill(name, module, tensors)
    return module
