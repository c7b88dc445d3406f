"""Models from modules: the user's own, those of transformers and open_clip, and timm's with their configuration."""

import dataclasses
from pathlib import Path

from torch import nn

from ..base import UserError, hub, line, unknown
from .added import of_state
from .model import Model, weights_sha256
from .names import damaged, entries
from .weights import IMAGENET


def create(architecture: str, image_size: int | None, **options) -> nn.Module:
    """A timm module. Raises UserError for an unknown name or tag, or an unsupported image size."""
    import timm

    if image_size:
        options["img_size"] = image_size
    try:
        return timm.create_model(architecture, **options)
    except RuntimeError as error:
        if "Unknown model" in str(error):
            names = [*entries(), *timm.list_models("*vit*")]
        elif "Invalid pretrained tag" in str(error):
            names = timm.list_pretrained(architecture.split(".")[0] + ".*")
        elif image_size and "sizes should be greater than 0" in str(error):
            raise UserError(f"{architecture}: images of {image_size} pixels are smaller than a patch") from error
        else:
            raise
        raise unknown("model", architecture.split(":")[-1], names, f"{damaged()}See `vitreg models`.") from None
    except (AssertionError, TypeError, ValueError) as error:
        if not image_size:
            raise
        raise UserError(f"{architecture} is not made for another image size: {line(error)}") from error


def with_config(name: str, module: nn.Module, sha256: str, image_size: int | None) -> Model:
    """A timm module as a `Model`, with the preprocessing of its configuration."""
    import timm.data

    config = timm.data.resolve_model_data_config(module)
    size = image_size or config["input_size"][1:]
    size = size if isinstance(size, int) or size[0] != size[1] else size[0]
    head = {"imagenet": (0, 1000)} if timm.data.infer_imagenet_subset(module) == "imagenet-1k" else {}
    options = dict(
        head=head, mean=tuple(config["mean"]), std=tuple(config["std"]), interpolation=config["interpolation"]
    )
    options |= dict(crop=config["crop_pct"], crop_mode=config["crop_mode"])
    return Model(name, module, sha256, input_size=size, **options)


def of_module(module: nn.Module) -> Model:
    """The user's own module as a `Model`; its device, mode and gradients stay unchanged."""
    name, digest = type(module).__name__, weights_sha256(module)
    if getattr(module, "pretrained_cfg", None):
        return dataclasses.replace(with_config(name, module, digest, None), label=name)
    config = getattr(module, "config", None)
    sizes = (getattr(part, "image_size", None) for part in (config, getattr(config, "vision_config", None), module))
    size = next((size for size in sizes if size), 224)
    size = size if isinstance(size, int) else size[0]
    model = Model(name, module, digest, input_size=size, label=name, **IMAGENET)
    if of_state(module.state_dict())[0]:
        model.role, model.registers_from = "mended", "test time" if model.registers else "none"
    else:
        model.registers_from = "trained" if model.registers else "none"
    return model


def of_transformers(name: str, repository: str) -> Model:
    """A model of transformers, with the preprocessing stored beside it."""
    try:
        import transformers
    except ImportError:
        raise UserError(f"{name}: needs the package transformers: pip install transformers") from None
    place = str(Path(repository).expanduser())
    with hub(name, "give the folder of a downloaded model, as hf:FOLDER, or a name of timm's"):
        module = transformers.AutoModel.from_pretrained(place)
    model = dataclasses.replace(of_module(module), name=name, label=name)
    try:
        spec = transformers.AutoImageProcessor.from_pretrained(place).to_dict()
    except Exception:  # without a stored one, ImageNet's stays
        return model
    sides = {**spec.get("size", {}), **(spec.get("crop_size") or {})}
    side = sides.get("height") or sides.get("shortest_edge") or model.input_size
    given = {k: tuple(spec[f"image_{k}"]) for k in ("mean", "std") if spec.get(f"image_{k}")}
    resized = (spec.get("size") or {}).get("shortest_edge") or side
    return dataclasses.replace(model, **given, input_size=side, crop=min(1.0, side / resized))


def of_open_clip(name: str, rest: str) -> Model:
    """The image tower of an open_clip model."""
    import open_clip

    architecture, _, tag = rest.partition("/")
    if architecture not in open_clip.list_models():
        raise unknown("architecture of open_clip", architecture, open_clip.list_models())
    names = open_clip.list_pretrained_tags_by_model(architecture)
    if not Path(tag).expanduser().is_file() and tag not in names:
        raise unknown(f"weights of {architecture}", tag, names, "Write open_clip:ARCH/TAG, or a file as TAG.")
    with hub(f"{name}: its weights", "give a downloaded file, as open_clip:ARCH/PATH"):
        clip = open_clip.create_model(architecture, pretrained=tag)
    tower, spec = clip.visual, open_clip.get_model_preprocess_cfg(clip)
    quick = any(type(part).__name__ == "QuickGELU" for part in tower.modules())
    tower.open_clip = {"architecture": architecture, "quick_gelu": quick}  # what builds it again
    size = spec["size"] if isinstance(spec["size"], int) else spec["size"][0]
    options = dict(mean=tuple(spec["mean"]), std=tuple(spec["std"]), interpolation=spec["interpolation"])
    return Model(name, tower, weights_sha256(tower), input_size=size, family="clip", label=name, **options)
