"""Modules of other libraries, and of the user's own, as models."""

import dataclasses
from pathlib import Path

from PIL import Image
from torch import nn

from ..base import UserError, hub, line, unknown
from .added import of_state, registers_from
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


def of_module(
    module: nn.Module, name: str = "", sha256: str = "", image_size: int | tuple[int, int] | None = None
) -> Model:
    """A module of any library as a `Model`, by default named by its class; device, mode and gradients stay unchanged.

    Size and preprocessing are those that the module states, else 224 pixels and ImageNet's. sha256: of its file, by
    default of its weights. image_size: of its images where it differs from what the module states.
    """
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    stated_size, facts = _stated(module)
    facts = facts | {"input_size": image_size or stated_size}
    model = Model(name or type(module).__name__, module, sha256 or weights_sha256(module), **facts)
    model.role = "mended" if of_state(module.state_dict())[0] else "trained"
    model.registers_from = registers_from(module, "trained" if model.registers else "none")
    return model


def _stated(module: nn.Module) -> tuple[int | tuple[int, int], dict]:
    """(input size, preprocessing and head as fields of `Model`) that a module states, or a module inside a wrapper."""
    parts = list(module.modules())
    if mini := next((part for part in parts if hasattr(part, "vit_arguments")), None):  # a mini ViT: the defaults
        return mini.patch_embed.img_size, {}
    if (of_timm := next((part for part in parts if getattr(part, "pretrained_cfg", None)), None)) is not None:
        import timm.data

        config = timm.data.resolve_model_data_config(of_timm)
        facts = dict(mean=tuple(config["mean"]), std=tuple(config["std"]), interpolation=config["interpolation"])
        facts |= dict(crop=config["crop_pct"], crop_mode=config["crop_mode"])
        if timm.data.infer_imagenet_subset(of_timm) == "imagenet-1k":
            facts["head"] = {"imagenet": (0, 1000)}
        built_for = getattr(getattr(of_timm, "patch_embed", None), "img_size", None)
        return built_for or config["input_size"][1:], facts
    config = next((part.config for part in parts if hasattr(part, "config")), None)
    sizes = (getattr(part, "image_size", None) for part in (config, getattr(config, "vision_config", None), module))
    return next((size for size in sizes if size), 224), IMAGENET


def of_transformers(name: str, repository: str, image_size: int | tuple[int, int] | None = None) -> Model:
    """A model of transformers, with the preprocessing stored beside it; image_size replaces its input size."""
    try:
        import transformers
    except ImportError:
        raise UserError(f"{name}: needs the package transformers: pip install transformers") from None
    place = str(Path(repository).expanduser())
    instead = "give the folder of a downloaded model, as hf:FOLDER, or a name of timm's"
    with hub(name, instead, local=Path(place).exists()):
        module = transformers.AutoModel.from_pretrained(place)
    model = of_module(module, name, image_size=image_size)
    try:
        spec = transformers.AutoImageProcessor.from_pretrained(place).to_dict()
    except Exception:  # without a stored one, ImageNet's stays
        return model
    size, crop = spec.get("size") or {}, spec.get("crop_size") if spec.get("do_center_crop") else None
    given = {k: tuple(spec[f"image_{k}"]) for k in ("mean", "std") if spec.get(f"image_{k}")}
    if spec.get("resample") is not None:
        given["interpolation"] = Image.Resampling(spec["resample"]).name.lower()
    if "height" in (crop or size):
        given["input_size"] = (crop or size)["height"], (crop or size)["width"]
    if crop and "shortest_edge" in size:
        given["crop"] = min(1.0, crop["height"] / size["shortest_edge"])
    elif "height" in size:
        given["crop_mode"] = "squash"
    given |= {"input_size": image_size} if image_size else {}
    return dataclasses.replace(model, **given)


def of_open_clip(name: str, rest: str, image_size: int | tuple[int, int] | None = None) -> Model:
    """The image tower of an open_clip model, for images of another size than its own with `image_size`."""
    import open_clip

    architecture, _, tag = rest.partition("/")
    if architecture not in open_clip.list_models():
        raise unknown("architecture of open_clip", architecture, open_clip.list_models())
    names = open_clip.list_pretrained_tags_by_model(architecture)
    if not Path(tag).expanduser().is_file() and tag not in names:
        raise unknown(f"weights of {architecture}", tag, names, "Write open_clip:ARCH/TAG, or a file as TAG.")
    with hub(f"{name}: its weights", "give a downloaded file, as open_clip:ARCH/PATH"):
        clip = open_clip.create_model(architecture, pretrained=tag, force_image_size=image_size)
    tower, spec = clip.visual, open_clip.get_model_preprocess_cfg(clip)
    quick = any(type(part).__name__ == "QuickGELU" for part in tower.modules())
    tower.open_clip = {"architecture": architecture, "quick_gelu": quick}  # what builds it again
    facts = dict(mean=tuple(spec["mean"]), std=tuple(spec["std"]), interpolation=spec["interpolation"])
    facts["crop_mode"] = {"squash": "squash", "longest": "border"}.get(spec["resize_mode"], "center")
    return dataclasses.replace(of_module(tower, name, image_size=spec["size"]), family="clip", **facts)
