"""From a name to a model that is ready to be looked into.

mini-deit3, vit-ti …      an entry of data/models.yaml
planted, mini-random      the two controls, entries too
timm:NAME, or NAME alone  a model of timm: VITREG_MODELS first, then the hub's cache, then the hub
file:PATH                 .safetensors, or .pt/.pth (weights only), or a folder in timm's hub layout;
                          file:PATH#ARCH names timm's architecture where the file does not
random:NAME               the same architecture with fresh weights: a control
NAME+ttrN                 any of them with N registers added at test time (see `mend`)
NAME+emptyN               with N tokens of zeros and nothing else changed
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import torch
from torch import nn

from ..base import CHECKPOINTS, UserError, hub, unknown
from ..data.scenes import ATTRIBUTES
from .model import Model, weights_sha256
from .names import available, damaged, entries, folder, split
from .weights import _at_size, _fill, _line, _read_json, _read_pickle, _read_safetensors, file_sha256

__all__ = ["available", "entries", "folder", "load", "split", "with_facts"]
FACTS = ("role", "family", "base", "registers_from", "head", "onset")  # fields of `Model` that an entry may give


def load(name: str, device: str | None = None, image_size: int | None = None) -> Model:
    """The model of that name, in evaluation mode, on `device` (CUDA where there is one, by default).

    `image_size` asks for another input size than the model's own; position embeddings are interpolated.
    Raises UserError for an unknown name, weights that cannot be had, or a damaged file.
    """
    base, kind, number = split(name)
    if kind:
        from . import mend

        remedy = {"ttr": mend.with_test_time_registers, "empty": mend.with_empty_tokens}[kind]
        model = remedy(load(base, device, image_size), number)
        model.label = name
        return model
    if base.startswith("random:"):
        model = _random(base, image_size)
    elif base.startswith("file:"):
        model = _file(base, image_size)
    elif base in entries():
        model = _entry(base, image_size)
    else:
        model = _timm(base, base.removeprefix("timm:"), image_size)
    model.label = model.label or base
    if model.registers and model.registers_from == "none":
        model.registers_from = "trained" if model.role == "trained" else "random"
    model.module.eval().requires_grad_(False)
    model.module.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model


def _entry(name: str, image_size: int | None) -> Model:
    entry = entries()[name]
    if "random" in entry:
        model = _random(f"random:{entry['random']}", image_size)
        model.name = name
    elif "timm" in entry:
        model = _timm(name, entry["timm"], image_size or entry.get("input_size"))
    else:
        model = _shipped(name, entry, image_size)
    model.about = entry.get("about", "")
    return model


def _shipped(name: str, entry: dict, image_size: int | None) -> Model:
    path = CHECKPOINTS / entry["file"]
    mend = "`git checkout -- data/checkpoints` restores it"
    if not path.exists():
        raise UserError(f"{name}: data/checkpoints/{path.name} is not here; {mend}")
    sha256 = file_sha256(path)
    if sha256 != entry["sha256"]:
        raise UserError(
            f"{name}: data/checkpoints/{path.name} is damaged or not the shipped one (sha256 {sha256[:12]}…, expected "
            f"{entry['sha256'][:12]}…); {mend}"
        )
    return with_facts(_mini_file(name, path, image_size), entry, name)


def with_facts(model: Model, facts: dict, entry: str = "") -> Model:
    """The model with the facts that an entry of models.yaml, or a file's metadata, states about it."""
    given = {fact: facts[fact] for fact in FACTS if fact in facts}
    if "head" in given:
        given["head"] = {question: tuple(ends) for question, ends in given["head"].items()}
    return dataclasses.replace(model, **given, **({"entry": entry} if entry else {}))


def _mini_file(name: str, path: Path, image_size: int | None = None) -> Model:
    """A checkpoint with timm's arguments and the training's settings in its metadata, as this project writes them."""
    metadata, tensors = _read_safetensors(path)
    from timm.models.vision_transformer import VisionTransformer

    module = VisionTransformer(**json.loads(metadata["vit"]))
    module.vit_arguments = json.loads(metadata["vit"])
    _fill(name, module, {k: v.float() for k, v in tensors.items()})
    size = image_size or module.patch_embed.img_size[0]
    if image_size:
        module.set_input_size((image_size, image_size))
    config = json.loads(metadata.get("config", "{}"))
    facts = {"family": config.get("recipe", ""), **json.loads(metadata.get("facts", "{}"))}
    head = _scenes_head(module) if config.get("recipe", "deit3") == "deit3" and not config.get("data") else {}
    return with_facts(Model(name, module, file_sha256(path), input_size=size, head=head), facts)


def _scenes_head(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Which logits answer which question about scenes, for a head of as many as the attributes have values."""
    ends = torch.tensor([0, *map(len, ATTRIBUTES.values())]).cumsum(0).tolist()
    return dict(zip(ATTRIBUTES, itertools.pairwise(ends), strict=True)) if module.num_classes == ends[-1] else {}


def _described_file(name, path, described: dict, tensors, image_size: int | None) -> Model:
    """Weights with what builds their model in their metadata, as `vitreg train registers` writes them."""
    arguments = described["model_args"] | ({"img_size": image_size} if image_size else {})
    overlay = described["pretrained_cfg"]
    module = _create(
        described["architecture"],
        None,
        num_classes=described["num_classes"],
        pretrained_cfg_overlay=overlay,
        **arguments,
    )
    module.timm_config = described
    _fill(name, module, {k: v.float() for k, v in (_at_size(module, tensors) if image_size else tensors).items()})
    return with_facts(_with_config(name, module, file_sha256(path), image_size), described.get("facts", {}))


def _random(name: str, image_size: int | None) -> Model:
    inner = name.removeprefix("random:")
    entry = entries().get(inner, {})
    with torch.random.fork_rng(devices=[]):  # the CPU's state alone: torch.manual_seed would reach into CUDA
        torch.default_generator.manual_seed(0)
        if "file" in entry:
            model = _entry(inner, image_size)
            model.module.init_weights("")
        else:
            module = _create(entry.get("timm", inner.removeprefix("timm:")), image_size, pretrained=False)
            model = _with_config(name, module, "", image_size)
    base = f"random:{entry['base']}" if "base" in entry else ""
    facts = dict(role="random control", entry=inner if entry else "", family="", base=base, onset=None)
    facts |= dict(name=name, about="", registers_from="none", sha256=weights_sha256(model.module))
    return dataclasses.replace(model, **facts)


def _create(architecture: str, image_size: int | None, **options) -> nn.Module:
    import timm

    if image_size:
        options["img_size"] = image_size
    try:
        return timm.create_model(architecture, **options)
    except RuntimeError as error:
        if "Unknown model" in str(error):
            known = [*entries(), *timm.list_models("*vit*")]
        elif "Invalid pretrained tag" in str(error):
            known = timm.list_pretrained(architecture.split(".")[0] + ".*")
        else:
            raise
        raise unknown("model", architecture.split(":")[-1], known, f"{damaged()}See `vitreg models`.") from None


def _with_config(name: str, module: nn.Module, sha256: str, image_size: int | None) -> Model:
    import timm.data

    config = timm.data.resolve_model_data_config(module)
    size = image_size or config["input_size"][-1]
    head = {"imagenet": (0, 1000)} if timm.data.infer_imagenet_subset(module) == "imagenet-1k" else {}
    options = dict(
        head=head, mean=tuple(config["mean"]), std=tuple(config["std"]), interpolation=config["interpolation"]
    )
    options |= dict(crop=config["crop_pct"], crop_mode=config["crop_mode"])
    return Model(name, module, sha256, input_size=size, **options)


def _timm(name: str, timm_name: str, image_size: int | None) -> Model:
    known = next((entry for entry in entries().items() if entry[1].get("timm") == timm_name), ("", {}))
    place = folder(timm_name)
    if place:
        return with_facts(_hub_folder(timm_name, place, image_size), known[1], known[0])
    instead = damaged() + (
        f"put a folder with config.json and model.safetensors from the hub's timm/{timm_name} into a folder named by "
        "VITREG_MODELS, or use --profile mini, which works offline"
    )
    with hub(f"{name}: its weights", instead):
        module = _create(timm_name, image_size, pretrained=True)
    return with_facts(_with_config(timm_name, module, weights_sha256(module), image_size), known[1], known[0])


def _hub_folder(name: str, folder: Path, image_size: int | None) -> Model:
    _read_json(folder / "config.json")
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise UserError(f"{name}: {folder.name} has a config.json but no model.safetensors")
    try:
        module = _create(f"local-dir:{folder}", image_size, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # safetensors and timm raise many kinds for damaged files
        raise UserError(f"{name}: model.safetensors in {folder.name} cannot be read: {_line(error)}") from error
    return _with_config(name, module, file_sha256(weights), image_size)


def _file(name: str, image_size: int | None) -> Model:
    location, _, architecture = name.removeprefix("file:").partition("#")
    path = Path(location).expanduser()
    if path.is_dir() and (path / "config.json").exists():
        return _hub_folder(name, path, image_size)
    if not path.is_file():
        raise UserError(f"{name}: no such file, and no folder with a config.json")
    if path.suffix == ".safetensors":
        metadata, tensors = _read_safetensors(path)
        if "vit" in metadata:
            return _mini_file(name, path, image_size)
        if "timm" in metadata:
            return _described_file(name, path, json.loads(metadata["timm"]), tensors, image_size)
    elif path.suffix in (".pt", ".pth"):
        tensors = _read_pickle(path)
    else:
        raise UserError(f"{name}: a .safetensors, .pt or .pth file is wanted")
    if not architecture:
        raise UserError(
            f"{name}: the file does not say its architecture; write file:{location}#ARCH with a name of timm's"
        )
    head = tensors.get("head.weight")
    options = {} if head is None else {"num_classes": len(head)}
    module = _create(architecture, image_size, pretrained=False, **options)
    _fill(name, module, _at_size(module, tensors) if image_size else tensors)
    return _with_config(name, module, file_sha256(path), image_size)
