"""Weights from files: read, unwrap, recognise the layout by its content, and load into a module.

A file is safetensors or the output of torch.save (.pt, .pth, .bin, .ckpt), read as weights only: a file that would run
code is refused. Training scripts may wrap the weights in state_dict, model, model_ema, teacher or student, and begin
their names with module., backbone., _orig_mod. or (Lightning) model. From a file with moving averages and raw weights,
the averages are taken by default.

Layouts (`recognise`): timm's, which is also that of DINO, MAE and DeiT-III; DINOv2 and DINOv3 of the official code,
also with blocks in chunks; image towers of OpenAI's CLIP and of open_clip; torchvision.
"""

import argparse
import contextlib
import hashlib
import io
import os
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ..base import UserError, line, written

AVERAGED, RAW = ("model_ema", "state_dict_ema", "ema", "teacher"), ("student",)
PLAIN = ("state_dict", "model", "module", "backbone")
BEFORE = r"^(module\.|_orig_mod\.|backbone\.|model\.|encoder\.(?=(blocks|patch_embed|norm)\.|(cls_token|pos_embed)$))+"
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic")
CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), interpolation="bicubic")
NAMES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}  # by width, as timm's


@dataclass(frozen=True)
class Layout:
    """Facts of a file's weights: the layout's name, timm's architecture, options for it, preprocessing if stated.

    architecture: the nearest one by width, depth and patch; "torchvision" for a module of torchvision's; "" for none.
    """

    name: str
    architecture: str
    options: dict
    preprocessing: dict


def file_sha256(path: Path) -> str:
    """A digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_safetensors(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(metadata, tensors) of a safetensors file. Raises UserError for a damaged one."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as f:
            return f.metadata() or {}, {key: f.get_tensor(key) for key in f.keys()}
    except Exception as error:  # safetensors raises its own kind, OSError or ValueError
        raise UserError(f"{path.name} is no whole safetensors file: {line(error)}") from error


def write_safetensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], previous: Path | None = None
) -> None:
    """Write a safetensors file, whole or not at all; the file that was there before becomes `previous`."""
    with written(path) as temporary:
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, temporary, metadata)
        if previous is not None and path.exists():
            os.replace(path, previous)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a header, and the header's brace."""
    with open(path, "rb") as f:
        return f.read(9)[8:] == b"{"


def read_weights(path: Path, which: str = "ema") -> tuple[dict[str, torch.Tensor], str]:
    """(tensors by name, name of the part taken) of any file; `which` selects averaged ("ema") or "raw" weights.

    "torchscript" opens a file of torch.jit, as OpenAI published its CLIP, which can run code: for trusted files alone.
    Raises UserError for a file that is damaged, would run code, or holds no weights.
    """
    if is_safetensors(path):
        tensors, taken = read_safetensors(path)[1], ""
    elif _is_torchscript(path):
        if which != "torchscript":
            raise UserError(
                f"{path.name} is a TorchScript archive, which can run code: for a file that you trust, --weights "
                'torchscript (vr.load(…, weights="torchscript"))'
            )
        tensors, taken = torch.jit.load(path, map_location="cpu").state_dict(), ""
        tensors = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    else:
        tensors, taken = _unwrapped(_read_pickle(path), which)
    tensors = {k: v for k, v in tensors.items() if torch.is_tensor(v)}
    if not tensors:
        raise UserError(f"{path.name} holds no weights by name")
    return {re.sub(BEFORE, "", name): value for name, value in tensors.items()}, taken


def _is_torchscript(path: Path) -> bool:
    """Whether a file is what torch.jit.save writes: an archive with code in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _read_pickle(path: Path):
    """What torch.save wrote, with argparse's Namespace and numpy's scalars allowed, which hold no code."""
    import numpy as np

    allowed = [argparse.Namespace, np.dtype, np._core.multiarray.scalar, *map(type, map(np.dtype, "fdilqLQ?"))]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated archives and refused pickles raise several kinds
        with open(path, "rb") as f:
            if f.read(1) not in (b"P", b"\x80"):  # of a zip archive, of a pickle
                raise UserError(f"{path.name} holds no weights: neither safetensors nor torch.save wrote it") from error
        raise UserError(f"{path.name} cannot be read as weights only: {line(error)}") from error


def _unwrapped(content, which: str) -> tuple[dict, str]:
    """(the innermost dict of tensors, the name of what was taken, "" where there was nothing to choose)."""
    taken = ""
    while isinstance(content, dict) and not any(map(torch.is_tensor, content.values())):
        inside = [key for key, value in content.items() if isinstance(value, dict) and value]
        averaged = [key for key in AVERAGED if key in inside]
        raw = [key for key in (*RAW, *PLAIN) if key in inside]
        chosen = (averaged + raw) if which == "ema" else (raw + averaged)
        if not chosen:
            break
        taken = chosen[0] if averaged and raw else taken
        content = content[chosen[0]]
    return content if isinstance(content, dict) else {}, taken


def recognise(tensors: dict[str, torch.Tensor]) -> tuple[Layout, dict[str, torch.Tensor]]:
    """The `Layout` of weights, and the weights that belong to the ViT: no decoder, no heads of a self-supervised loss.

    Raises UserError for weights of an unknown layout.
    """
    tensors = {re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", k): v for k, v in tensors.items()}  # blocks in chunks
    own = {
        k: v for k, v in tensors.items() if not re.match(r"decoder|(dino_|ibot_)?head\.(mlp|last_layer)|dino_|ibot_", k)
    }
    if "conv_proj.weight" in own:
        return Layout("torchvision", "torchvision", {}, IMAGENET | {"interpolation": "bilinear"}), own
    if "visual.class_embedding" in own or "class_embedding" in own:
        return _clip(own)
    patch = own.get("patch_embed.proj.weight")
    if patch is None or "blocks.0.norm1.weight" not in own:
        raise UserError(f"no layout of a ViT is recognised; the weights' names begin {', '.join(list(tensors)[:4])}")
    width, size = patch.shape[0], patch.shape[-1]
    name, head = NAMES.get(width, ""), own.get("head.weight")
    options = {"num_classes": 0 if head is None else len(head)}
    if "storage_tokens" in own:
        bias = own.get("blocks.0.attn.qkv.bias")
        with_bias = "_qkvb" if bias is not None and bias.nan_to_num().any() else ""
        return Layout("DINOv3", f"vit_{name}_patch{size}_dinov3{with_bias}", options, IMAGENET), own
    if "register_tokens" in own or ("mask_token" in own and "blocks.0.ls1.gamma" in own):
        registers = f"_reg{own['register_tokens'].shape[1]}" if "register_tokens" in own else ""
        return Layout("DINOv2", f"vit_{name}_patch{size}{registers}_dinov2", options, IMAGENET), own
    if "blocks.0.gamma_1" in own:
        return Layout("DeiT-III", f"deit3_{name}_patch{size}_224", options, IMAGENET), own
    decoder, heads = any(k.startswith("decoder") for k in tensors), len(own) < len(tensors)
    kind = "MAE" if decoder else "DINO" if heads else "timm's, without a head" if head is None else "timm's"
    # weights without a head come from self-supervised training, which uses ImageNet's mean throughout
    return Layout(kind, f"vit_{name}_patch{size}_224", options, IMAGENET if head is None else {}), own


def _clip(own: dict[str, torch.Tensor]) -> tuple[Layout, dict[str, torch.Tensor]]:
    openai = "input_resolution" in own  # only OpenAI's own files say it; their models have another activation
    own = {k: v for k, v in own.items() if k.startswith("visual.")} or {f"visual.{k}": v for k, v in own.items()}
    width, size = own["visual.conv1.weight"].shape[::3]
    options = {"num_classes": own["visual.proj"].shape[1] if "visual.proj" in own else 0}
    architecture = f"vit_{NAMES.get(width, '')}_patch{size}_clip_{'quickgelu_' * openai}224"
    return Layout("OpenAI's CLIP" if openai else "open_clip", architecture, options, CLIP), own


def torchvision_vit(name: str, tensors: dict[str, torch.Tensor], image_size: int | None = None) -> nn.Module:
    """A torchvision VisionTransformer with these weights; heads are 64 wide, as in all torchvision models.

    image_size: of square images where it is not the weights' own; position embeddings are interpolated.
    """
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    width, _, _, size = tensors["conv_proj.weight"].shape
    depth = 1 + max(int(k.split("encoder_layer_")[1].split(".")[0]) for k in tensors if "encoder_layer_" in k)
    side = round((tensors["encoder.pos_embedding"].shape[1] - 1) ** 0.5)
    hidden = tensors["encoder.layers.encoder_layer_0.mlp.0.weight"].shape[0]
    classes = len(tensors["heads.head.weight"]) if "heads.head.weight" in tensors else 1000
    if image_size:
        side, tensors = image_size // size, interpolate_embeddings(image_size, size, dict(tensors))
    module = VisionTransformer(side * size, size, depth, max(1, width // 64), width, hidden, num_classes=classes)
    fill(name, module, tensors)
    return module


def fill(name: str, module: nn.Module, tensors: dict[str, torch.Tensor], convert: bool = True) -> None:
    """Load weights; only those of the classifier may be missing or superfluous.

    Names and position embeddings are converted by timm's own filter for the module's class, if `convert`. Raises
    UserError with the names or shapes that do not fit and the nearest architecture that does.
    """
    filter = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None) if convert else None
    of_deit3 = any(".gamma_1" in k for k in tensors) and not type(module).__module__.endswith(".eva")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints what it tries
            options = {"adapt_layer_scale": True} if of_deit3 else {}
            fitted = filter(dict(tensors), module, **options) if filter else tensors
        missing, extra = module.load_state_dict(fitted, strict=False)
        names = [k for k in [*missing, *extra] if not k.startswith("head")]
        wrong = ", ".join(names[:4]) + " …" * (len(names) > 4)
    except (RuntimeError, KeyError, AttributeError) as error:
        wrong = line(error)
    if wrong:
        raise UserError(f"{name}: the weights do not fit the architecture: {wrong}{_nearest(name, tensors)}")


def _nearest(name: str, tensors: dict[str, torch.Tensor]) -> str:
    """The end of an error message: the weights' first names, and their architecture where it is not the named one."""
    import timm

    begin = f"; their names begin {', '.join(list(tensors)[:2])}"
    try:
        architecture = recognise(tensors)[0].architecture
    except UserError:
        return begin
    other = timm.is_model(architecture) and f"#{architecture}" not in name
    return begin + (f"; they look like #{architecture}" if other else "")
