"""A model in one safetensors file: all tensors, and metadata that build the model again.

The metadata hold one of

    vit            arguments of timm's VisionTransformer (the mini ViTs)
    timm           architecture, num_classes, model_args, pretrained_cfg
    transformers   class, config
    open_clip      architecture, quick_gelu
    torchvision    arguments of its VisionTransformer
    own            the class of a module that no name builds: `onto` loads the file into one

and `facts`: the fields of `Model` that stay true. The buffers of a mended model (see `added`) are among the tensors.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import torch
from torch import nn

from ..base import UserError, line, written
from ..data.images import sides
from ..data.scenes import ATTRIBUTES
from ..hooks.capture import evaluating
from . import added
from .model import FACTS, Model, with_facts
from .names import entries
from .outside import create, of_module
from .weights import file_sha256, fill, read_safetensors, write_safetensors

SUFFIXES = (".safetensors", ".pt2", ".onnx")
KINDS = ("vit", "timm", "transformers", "open_clip", "torchvision", "own")
CONFIG = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # of timm's pretrained_cfg: how to feed a model
STATED = (*FACTS, "about", "input_size", "mean", "std", "interpolation", "crop", "crop_mode")  # fields of `Model`
OF_TORCHVISION = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "num_classes")


def write(model: Model, path: Path) -> None:
    """Write a model into a file that `zoo.load("file:PATH")` loads in a fresh process, with equal outputs.

    PATH.pt2 and PATH.onnx become a program instead (`export`). Raises UserError where the file cannot be written.
    """
    path = Path(path)
    check(path)
    if path.suffix != ".safetensors":
        return export(model, path)
    facts = {name: getattr(model, name) for name in STATED}
    kind, spec = how_built(model.module)
    if kind != "own" and not _builds(model, kind, spec):  # it was built with arguments of its own
        kind, spec = "own", type(model.module).__name__
    metadata = {kind: json.dumps(spec), "facts": json.dumps(facts), "format": "pt"}
    write_safetensors(path, model.module.state_dict(), metadata)


def _builds(model: Model, kind: str, spec) -> bool:
    """Whether a module built by `build`, with this model's weights, answers as this model does."""
    additions, tensors = added.of_state(model.module.state_dict())
    try:
        again = build("", kind, spec).to(model.weights)
        again.load_state_dict(tensors)
    except (UserError, RuntimeError, TypeError, ValueError):
        return False
    again = dataclasses.replace(model, module=added.with_additions(again, additions) if additions else again)
    noise = torch.randn(1, model.anatomy.channels, *sides(model.input_size), generator=torch.Generator().manual_seed(0))
    with evaluating(model.module), evaluating(again.module):
        one, other = (_Answer(each)(noise.to(model.weights)) for each in (model, again))
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-3 * one.abs().max().item())


def check(path: Path) -> None:
    """Raise UserError for a name that does not end as one of a model's file."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path.name}: a model is written into a file whose name ends in {', '.join(SUFFIXES)}")


def how_built(module: nn.Module) -> tuple[str, dict | str]:
    """(one of `KINDS`, its value): what `build` builds a module again from, without its weights."""
    if hasattr(module, "vit_arguments"):
        return "vit", {**module.vit_arguments, "img_size": module.patch_embed.img_size}
    if (getattr(module, "pretrained_cfg", None) or {}).get("architecture"):
        return "timm", _of_timm(module)
    if type(module).__module__.startswith("transformers."):
        return "transformers", {"class": type(module).__name__, "config": json.loads(module.config.to_json_string())}
    if hasattr(module, "open_clip"):
        return "open_clip", module.open_clip
    if type(module).__module__.startswith("torchvision."):
        spec = {name: getattr(module, name) for name in OF_TORCHVISION}
        layers = module.encoder.layers
        return "torchvision", {**spec, "num_layers": len(layers), "num_heads": layers[0].num_heads}
    return "own", type(module).__name__


def _of_timm(module: nn.Module) -> dict:
    cfg, model_args = module.pretrained_cfg, getattr(module, "timm_config", {}).get("model_args", {})
    overlay, size = {key: cfg[key] for key in CONFIG if key in cfg}, getattr(module.patch_embed, "img_size", None)
    if size:
        model_args, overlay = {**model_args, "img_size": list(size)}, overlay | {"input_size": (3, *size)}
    spec = {"architecture": cfg["architecture"], "num_classes": module.num_classes}
    return spec | {"model_args": model_args, "pretrained_cfg": overlay}


def read(name: str, path: Path, image_size: int | None = None) -> Model | None:
    """The model in a file, None where its metadata do not build one. Raises UserError for a damaged or foreign file."""
    metadata, tensors = read_safetensors(path)
    kind = next((kind for kind in KINDS if kind in metadata), None)
    if kind is None:
        return None
    try:
        spec, facts, config = (json.loads(metadata.get(key, "{}")) for key in (kind, "facts", "config"))
        module = build(name, kind, spec, image_size)
    except UserError:
        raise
    except Exception as error:  # libraries raise many kinds for arguments that contradict one another
        remedy = "try another size" if image_size else "write it anew, or vr.saved.onto(module, PATH)"
        raise UserError(f"{name}: what its metadata say of {kind} builds no model: {line(error)}; {remedy}") from error
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    additions, tensors = added.of_state(tensors)
    fill(name, module, tensors, convert=kind == "timm")
    if kind == "vit" and image_size:
        module.set_input_size(sides(image_size))
    module = added.with_additions(module, additions) if additions else module
    facts = _facts_of_training(config, module) | facts | ({"input_size": image_size} if image_size else {})
    return with_facts(of_module(module, name, file_sha256(path)), facts, which=STATED)


def onto(module: nn.Module, path: str | Path) -> nn.Module:
    """A copy of a module of one's own with the weights of a mended file and what was added there: for a model that no
    name builds. Raises UserError for the file of another model."""
    additions, tensors = added.of_state(read_safetensors(Path(path))[1])
    module = added.with_additions(module, additions)
    fill(type(module).__name__, module, {**tensors, **additions}, convert=False)
    return module


class _Answer(nn.Module):
    """A module from images to one tensor: the model's output; for transformers, the tokens after the last block."""

    def __init__(self, model: Model):
        super().__init__()
        self.module = model.module
        self.run = model.anatomy.forward if hasattr(model.module, "config") else model.module

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answer = self.run(images)
        return answer if torch.is_tensor(answer) else answer.last_hidden_state


def export(model: Model, path: Path) -> None:
    """Write a model as a program for any number of images: PATH.pt2 for torch.export, PATH.onnx for ONNX.

    It takes normalised images of the model's own size. The program is run on one image and on three; raises UserError
    where its output differs from the model's, or where a package is missing.
    """
    answer = _Answer(model).eval()
    size = (model.anatomy.channels, *sides(model.input_size))
    x = torch.randn(3, *size, generator=torch.Generator().manual_seed(0)).to(model.weights)
    free = {"images": {0: torch.export.Dim("batch", min=1, max=4096)}}
    with torch.no_grad(), written(path) as temporary:
        program = torch.export.export(answer, (x,), dynamic_shapes=free)
        if path.suffix == ".pt2":
            torch.export.save(program, temporary.with_suffix(".pt2"))
            temporary.with_suffix(".pt2").replace(temporary)
            runs = [program.module()(part) for part in (x[:1], x)]
        else:
            runs = _onnx(program, x, temporary)
        for run, part in zip(runs, (x[:1], x), strict=True):
            expected = answer(part).cpu()
            gap = ((run.cpu() - expected).abs().max() / expected.abs().max()).item()
            if not gap < 1e-3:
                raise UserError(f"{path.name} answers otherwise than the model (relative difference {gap:.1e})")


def _onnx(program, x: torch.Tensor, path: Path) -> list[torch.Tensor]:
    """Write an exported program as ONNX; return the outputs of onnxruntime for one image and for all of `x`."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError:
        raise UserError("ONNX needs packages: pip install onnx onnxscript onnxruntime") from None
    torch.onnx.export(program, (x,), dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [torch.from_numpy(session.run(None, {name: part.float().cpu().numpy()})[0]) for part in (x[:1], x)]


def build(name: str, kind: str, spec, image_size: int | None = None) -> nn.Module:
    """A new module from what `how_built` returns: one of `KINDS` and its value. `name` is for errors."""
    if kind == "vit":
        from timm.models.vision_transformer import VisionTransformer

        module = VisionTransformer(**spec)
        module.vit_arguments = spec
    elif kind == "timm":
        arguments = spec["model_args"] | ({"img_size": image_size} if image_size else {})
        options = dict(num_classes=spec["num_classes"], pretrained_cfg_overlay=spec["pretrained_cfg"])
        module = create(spec["architecture"], None, **options, **arguments)
        module.timm_config = spec
    elif kind == "transformers":
        import transformers

        made = getattr(transformers, spec["class"], None)
        if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
            raise UserError(f"{name}: transformers has no model {spec['class']!r}")
        module = made(made.config_class.from_dict(spec["config"]))
    elif kind == "open_clip":
        import open_clip

        clip = open_clip.create_model(spec["architecture"], force_quick_gelu=spec["quick_gelu"])
        module = clip.visual
        module.open_clip = spec
    elif kind == "torchvision":
        from torchvision.models import VisionTransformer

        module = VisionTransformer(**spec)
    else:
        raise UserError(f"{name}: no name builds a {spec}: build one, then vitreg_lib.model.saved.onto(module, PATH)")
    return module


def _facts_of_training(config: dict, module: nn.Module) -> dict:
    """Facts about a model from the settings of its training here."""
    recipe = config.get("recipe", "")
    if recipe == "registers" and config["registers"]:
        family = entries().get(config["model"], {}).get("family", "")
        return {"base": config["model"], "family": family, "registers_from": "fine-tuned"}
    if not hasattr(module, "vit_arguments"):
        return {}
    of_scenes = recipe in ("", "deit3") and not config.get("data")
    return {"family": Path(recipe).stem, "head": _scenes_head(module) if of_scenes else {}}


def _scenes_head(module: nn.Module) -> dict[str, tuple[int, int]]:
    """The range of logits of each question about scenes, for a head with one logit per value of the attributes."""
    ends = torch.tensor([0, *map(len, ATTRIBUTES.values())]).cumsum(0).tolist()
    return dict(zip(ATTRIBUTES, itertools.pairwise(ends), strict=True)) if module.num_classes == ends[-1] else {}
