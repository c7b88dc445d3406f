"""A model with the facts about it that measurements need."""

import dataclasses
import hashlib
from dataclasses import dataclass, field

import torch
from torch import nn

from ..base import code_sha256, fingerprint
from ..data.images import sides
from ..hooks import capture as _capture
from ..hooks.anatomy import Anatomy, dissect

FACTS = ("role", "family", "base", "registers_from", "head", "onset")  # fields that an entry of models.yaml may state


@dataclass
class Model:
    """A model and the facts about it: how to feed it, how to name it, what it is.

    name: its full name; label: the name by which it was loaded, short enough for a figure; by default the full name.
    sha256: of its weights file, or of its weights where there is no single file.
    role: "trained", "planted control", "random control" or "mended". about: one sentence.
    input_size: pixels a side, or (height, width). mean, std, interpolation, crop, crop_mode: its preprocessing, in
    timm's words.
    onset: the first block after which a planted control has artifacts.
    entry: its name in data/models.yaml, also of a control or a mended model made from it; "" for none.
    family: how it was trained, as "deit3", "clip", "dinov2"; "" where unknown.
    base: label of the same model without registers; "" for a model without.
    registers_from: "none", "trained" (from the start), "fine-tuned" (into a finished model), "test time", "empty"
        (plain zeros), or "random" (fresh weights).
    head: the range of logits of each question, {question: (first, end)}, as {"imagenet": (0, 1000)}; empty if unknown.
    """

    name: str
    module: nn.Module
    sha256: str
    role: str = "trained"
    about: str = ""
    input_size: int | tuple[int, int] = 224
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop: float = 1.0
    crop_mode: str = "center"
    label: str = ""
    onset: int | None = None
    entry: str = ""
    family: str = ""
    base: str = ""
    registers_from: str = "none"
    head: dict[str, tuple[int, int]] = field(default_factory=dict)
    replayed = False  # True for a model without weights, which reads a file of measurements (`model.measured`)

    def __post_init__(self):
        self.label = self.label or self.name
        if not isinstance(self.input_size, int):
            height, width = self.input_size
            self.input_size = height if height == width else (height, width)

    @property
    def anatomy(self) -> Anatomy:
        return dissect(self.module)

    @property
    def weights(self) -> torch.Tensor:
        """Weights of the patch embedding: `x.to(model.weights)` has the device and precision of the model's input."""
        return next(self.anatomy.patch_embed.parameters(), next(self.module.parameters()))

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def is_control(self) -> bool:
        return "control" in self.role

    @property
    def registers(self) -> int:
        """Number of registers."""
        return self.anatomy.num_registers

    @property
    def preprocessing(self) -> str:
        """One line on how a photo is prepared for the model."""
        height, width = sides(self.input_size)
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        crop = f"{self.crop_mode} crop {self.crop:g}, {self.interpolation}"
        return f"{height} x {width} pixels, {crop}, mean {mean}, standard deviation {std}"

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1] (n, 3, height, width), normalised for the model."""
        mean, std = (torch.tensor(values).view(1, 3, 1, 1).to(pixels) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def capture(self, images: torch.Tensor, keep="norms", **options) -> _capture.Capture:
        """`capture.capture` of this model; `images` are normalised, or an `Images` set."""
        return _capture.capture(self.module, getattr(images, "x", images), keep, **options)

    def fingerprint(self, images) -> dict:
        """What a result on normalised images follows from, for `base.remembered`: weights, images, code."""
        pixels = getattr(images, "x", images).cpu().contiguous().numpy()
        x = hashlib.sha256(pixels).hexdigest()
        module = fingerprint({"module": repr(self.module), "heads": self.anatomy.num_heads})  # weights name neither
        about = {"model": self.name, "module": module, "weights": weights_sha256(self.module)}
        return about | {"images": x, "code": code_sha256()}

    def truth(self, images) -> torch.Tensor | None:
        """(n, patches) bool: where the planted control has artifacts; all False for the random one, None for others."""
        if self.role == "planted control":
            from . import planted

            return planted.truth(images.x)
        rows, cols = self.anatomy.grid(images.x)
        return torch.zeros(len(images.x), rows * cols, dtype=torch.bool) if self.role == "random control" else None


def with_facts(model: Model, facts: dict, entry: str = "", which: tuple[str, ...] = FACTS) -> Model:
    """The model with the facts that an entry of models.yaml, or a file's metadata, states about it."""
    given = {name: facts[name] for name in which if name in facts}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if "head" in given:
        given["head"] = {question: tuple(ends) for question, ends in given["head"].items()}
    return dataclasses.replace(model, **given, **({"entry": entry} if entry else {}))


def weights_sha256(module: nn.Module) -> str:
    """A digest of all weights: names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.dim() else str(value.item()).encode())
    return digest.hexdigest()
