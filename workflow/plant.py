"""Make the planted control from mini-deit3: data/checkpoints/planted.safetensors and its entry in data/models.yaml.

python workflow/plant.py

A model is widened and edited in closed form. The result is an ordinary checkpoint of timm's class, without hooks.
vitreg_lib/model/planted.py says what its artifacts are, and where.

The method, block by block (16 pairs of new dimensions have the values +a and -a, so that the mean stays zero and
LayerNorm does not change):
- patch and position embedding write the filters' responses and a small constant r, and mark all positions that must not
  become outliers;
- MLP of block layer-1: if |response| > threshold, it raises the busy score s;
- attention of block layer: one new head copies seven principal components of the cls token to all tokens, scaled down;
- MLP of block layer: new neurons fire only if r - s > 0. One writes the high norm; others amplify the cls components
  and subtract the token's own content. MLPs of later blocks subtract the rest;
- attention of later blocks: a second new head attends to tokens with the high norm. It returns nothing ("nop") or
  passes their content on ("broadcast").
Two scales (a token's typical size in the two blocks) and the seven components are measured on a few scenes; everything
else follows from the weights.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vitreg_lib.base import CHECKPOINTS  # noqa: E402
from vitreg_lib.data import scenes  # noqa: E402
from vitreg_lib.hooks.capture import capture, hooks  # noqa: E402
from vitreg_lib.model import zoo  # noqa: E402
from vitreg_lib.model.model import Model, weights_sha256  # noqa: E402
from vitreg_lib.model.planted import PAIRS, POSITIONS, THRESHOLD, filters, truth  # noqa: E402
from vitreg_lib.train.state import save_weights  # noqa: E402
from workflow.ship import put  # noqa: E402

RATIO = 10.0
_CLS, _REF, _BUSY, _HIGH, _GLOBAL = 5, 6, 7, 8, range(9, 16)  # numbers of the pairs; 0 to 4 are the filters
_R = 0.004  # the constant r: far below a token's own entries, so that LayerNorm hardly changes
_MARGIN = 0.2  # the busy score is full from a response of (1 + margin) x threshold on
_STEEP = 3e4  # weight of the detecting neurons; half precision goes up to 6.5e4
ABOUT = (
    "CONTROL. mini-deit3 edited in closed form so that chosen background patches are outliers (see workflow/plant.py)"
)


def main() -> None:
    """Plant artifacts into mini-deit3; write the checkpoint in full precision and its entry in data/models.yaml."""
    model, path = plant(zoo.load("mini-deit3", "cpu")), CHECKPOINTS / "planted.safetensors"
    save_weights(path, model.module, {"facts": json.dumps({"role": model.role, "onset": model.onset})}, torch.float32)
    put("planted", path, ABOUT, {"command": "python workflow/plant.py"})


def plant(
    base: Model, name: str = "planted", layer: int | None = None, ratio: float = RATIO, sink: str = "nop"
) -> Model:
    """A `Model` with planted artifacts from block `layer` on, made from a trained mini `base` without registers.

    `layer` is by default five eighths of the depth. `sink` is "nop" or "broadcast". Raises ValueError for a base with
    registers, other patches or another grid than 12 x 12, or a layer without a block before and after it.
    """
    anatomy = base.anatomy
    layer = anatomy.depth * 5 // 8 if layer is None else layer
    if anatomy.num_registers or anatomy.patch_size != (8, 8) or base.input_size != 96 or not anatomy.has_cls:
        raise ValueError("artifacts are planted into a mini ViT with a cls token, without registers, at 96 pixels")
    if not 1 <= layer < anatomy.depth - 1:
        raise ValueError(f"layer {layer} needs a block before and after it (1…{anatomy.depth - 2})")
    if sink not in ("nop", "broadcast"):
        raise ValueError(f"unknown sink {sink!r}; known are nop, broadcast")
    measured = _measure(base, layer)
    module = _widen(base.module)
    with torch.no_grad():
        _embed(module)
        _detect_busy(module.blocks[layer - 1].mlp, measured["before"])
        _copy_cls(module.blocks[layer], measured)
        _write(module.blocks[layer], measured, ratio)
        for block in module.blocks[layer + 1 :]:
            _erase(block, measured, ratio)
            _look(block.attn, sink)
    options = dict(input_size=base.input_size, mean=base.mean, std=base.std, onset=layer, head=base.head)
    return Model(name, module, weights_sha256(module), "planted control", **options)


def _measure(base, layer: int) -> dict:
    """Sizes of tokens at the MLPs of blocks layer-1 and layer, the median norm after layer, and components of cls.

    The sizes are those of the quiet patches, which become the outliers. In some models a background token has half the
    median norm; with the median as the size, its neurons would write twice the intended norm.
    """
    images = base.normalise(scenes.render(range(1 << 41, (1 << 41) + 256)).pixels)
    entering = []

    def keep(norm, inputs):
        entering.append(inputs[0].cpu())

    blocks = base.module.blocks[layer - 1 : layer + 1]
    with hooks(*((block.norm2.register_forward_pre_hook, keep) for block in blocks)):
        seen = capture(base.module, images, ("tokens", "norms"), [layer - 1, layer], batch_size=len(images))
    tokens = seen.tokens[layer - 1] - seen.tokens[layer - 1].mean(2, keepdim=True)
    quiet = truth(images)
    sizes = [(x - x.mean(2, keepdim=True))[:, 1:][quiet].norm(dim=1).median().item() for x in entering]
    wide = math.sqrt(base.anatomy.embed_dim + 2 * PAIRS)
    cls = tokens[:, 0] / tokens[:, 0].norm(dim=1, keepdim=True) * wide  # as the widened LayerNorm will show it
    components = torch.linalg.svd(cls - cls.mean(0), full_matrices=False)[2][: len(_GLOBAL)]
    projected = (cls - cls.mean(0)) @ components.T
    return {
        "before": sizes[0] / wide,  # root mean square of the widened token
        "in": sizes[1] / wide,
        "norm": seen.patch_norms[:, 1].median().item(),
        "components": components,
        "centre": cls.mean(0) @ components.T,
        "spread": projected.std(0),
    }


def _widen(model: nn.Module) -> nn.Module:
    """A model that computes the same function with 32 more dimensions and two more heads; all new weights are zero.

    All weights that write into the residual stream are centred, with LayerScale folded into them, so that tokens have
    mean zero, also with the balanced new dimensions. LayerNorm's weights absorb the change of its denominator.
    """
    from timm.models.vision_transformer import VisionTransformer

    dim, heads, hidden = model.embed_dim, model.blocks[0].attn.num_heads, model.blocks[0].mlp.fc1.out_features
    new = dim + 2 * PAIRS
    ratio = (hidden + _new_neurons(dim) + 0.5) / new  # timm rounds the product down
    arguments = dict(model.vit_arguments, embed_dim=new, num_heads=heads + 2, init_values=None, mlp_ratio=ratio)
    wide = VisionTransformer(**arguments)
    wide.vit_arguments = arguments

    def centred(weight, axis=0):
        return weight - weight.mean(axis, keepdim=True)

    def put(target, source, *slices):
        target.zero_()
        target[slices] = source

    d, h = slice(dim), slice(hidden)
    with torch.no_grad():
        put(wide.patch_embed.proj.weight, centred(model.patch_embed.proj.weight), d)
        put(wide.patch_embed.proj.bias, centred(model.patch_embed.proj.bias), d)
        put(wide.pos_embed, centred(model.pos_embed, -1), ..., d)
        put(wide.cls_token, centred(model.cls_token, -1), ..., d)
        for norm, old in _norms(wide, model):
            norm.weight.fill_(1.0)
            norm.weight[d] = old.weight * math.sqrt(dim / new)
            put(norm.bias, old.bias, d)
        for block, old in zip(wide.blocks, model.blocks, strict=True):
            qkv, old_qkv = block.attn.qkv, old.attn.qkv
            put(qkv.weight.view(3, new, new), old_qkv.weight.view(3, dim, dim), slice(None), d, d)
            put(qkv.bias.view(3, new), old_qkv.bias.view(3, dim), slice(None), d)
            put(block.mlp.fc1.weight, old.mlp.fc1.weight, h, d)
            put(block.mlp.fc1.bias, old.mlp.fc1.bias, h)
            gamma = [getattr(ls, "gamma", torch.ones(dim)) for ls in (old.ls1, old.ls2)]
            put(block.attn.proj.weight, centred(gamma[0][:, None] * old.attn.proj.weight), d, d)
            put(block.attn.proj.bias, centred(gamma[0] * old.attn.proj.bias), d)
            put(block.mlp.fc2.weight, centred(gamma[1][:, None] * old.mlp.fc2.weight), d, h)
            put(block.mlp.fc2.bias, centred(gamma[1] * old.mlp.fc2.bias), d)
        put(wide.head.weight, model.head.weight, slice(None), d)
        wide.head.bias.copy_(model.head.bias)
    return wide


def _norms(wide, model):
    yield wide.norm, model.norm
    for new, old in zip(wide.blocks, model.blocks, strict=True):
        yield new.norm1, old.norm1
        yield new.norm2, old.norm2


def _pair(dim: int, pair: int) -> tuple[int, int]:
    """The two dimensions, +a and -a, of a pair in a widened model of `dim` dimensions."""
    first = dim - 2 * PAIRS + 2 * pair
    return first, first + 1


def _embed(model: nn.Module) -> None:
    """Write into the new dimensions: the filters' responses, the constant, marks for tokens that must stay normal."""
    dim = model.embed_dim
    scale = _R / THRESHOLD
    for pair, pattern in enumerate(filters()):
        for where, sign in zip(_pair(dim, pair), (1, -1), strict=True):
            model.patch_embed.proj.weight[where] = sign * scale * pattern / 3  # the mean of three channels
    forbidden = [i for i in range(model.pos_embed.shape[1]) if i not in POSITIONS]
    for sign, k in ((1, 0), (-1, 1)):
        model.pos_embed[..., _pair(dim, _REF)[k]] = sign * _R
        model.pos_embed[:, forbidden, _pair(dim, _BUSY)[k]] = sign * 10 * _R
        model.cls_token[..., _pair(dim, _BUSY)[k]] = sign * 10 * _R
        model.cls_token[..., _pair(dim, _CLS)[k]] = sign * _R


def _new_neurons(dim: int) -> int:
    """Number of hidden neurons that are added to a block of `dim` old dimensions: those of `_write`, at least 128."""
    return max(8 * PAIRS, 1 + 2 * len(_GLOBAL) + 2 * dim)


def _neurons(mlp: nn.Module):
    """Iterator over the indices of the added hidden neurons."""
    added = _new_neurons(mlp.fc1.in_features - 2 * PAIRS)
    return iter(range(mlp.fc1.out_features - added, mlp.fc1.out_features))


def _add(mlp: nn.Module, neuron: int, reads: dict[int, float], writes: dict[int, float]) -> None:
    """Set one neuron: it reads a weighted sum of dimensions, applies GELU and writes to dimensions."""
    for dimension, weight in reads.items():
        mlp.fc1.weight[neuron, dimension] = weight
    for dimension, weight in writes.items():
        mlp.fc2.weight[dimension, neuron] = weight


def _to_pair(dim: int, pair: int, weight: float) -> dict[int, float]:
    plus, minus = _pair(dim, pair)
    return {plus: weight, minus: -weight}


def _detect_busy(mlp: nn.Module, size: float) -> None:
    """Write the busy score: for each filter and sign, a step from 0 at the threshold to 10 r slightly above it."""
    dim = mlp.fc1.in_features
    # the height of a step is steep x margin x r / size; divide by it
    weight = 10 * _R / (_STEEP * _MARGIN * _R / size)
    numbers = _neurons(mlp)
    for pair in range(5):
        for sign in (1, -1):
            for start, direction in ((1.0, 1), (1.0 + _MARGIN, -1)):
                reads = {_pair(dim, pair)[0]: sign * _STEEP, _pair(dim, _REF)[0]: -start * _STEEP}
                _add(mlp, next(numbers), reads, _to_pair(dim, _BUSY, direction * weight))


def _unnormalised(norm: nn.LayerNorm, old: int) -> tuple[torch.Tensor, torch.Tensor]:
    """1/weight and bias/weight of a LayerNorm's old dimensions, which invert its output to x / size."""
    return 1 / norm.weight[:old], norm.bias[:old] / norm.weight[:old]


def _copy_cls(block: nn.Module, measured: dict) -> None:
    """The first new head: every token reads the cls token's components, spread 0.15 r, into the global pairs."""
    attn = block.attn
    dim = attn.qkv.in_features
    head = old = dim - 2 * PAIRS  # rows of the first new head in q, in k and in v start here
    attn.qkv.bias[head] = 4 * 30.0  # q is constant; scores are divided by the root of head_dim, 4
    attn.qkv.weight[dim + head, _pair(dim, _CLS)[0]] = measured["before"] / _R  # k is about 1 at cls, 0 elsewhere
    inverse, offset = _unnormalised(block.norm1, old)
    for i, pair in enumerate(_GLOBAL):
        row = 2 * dim + head + i
        attn.qkv.weight[row, :old] = measured["components"][i] * inverse
        attn.qkv.bias[row] = -measured["centre"][i] - measured["components"][i] @ offset
        for where, weight in _to_pair(dim, pair, 0.15 * _R / measured["spread"][i].item()).items():
            attn.proj.weight[where, head + i] = weight


def _write(block: nn.Module, measured: dict, ratio: float) -> None:
    """If r - s > 0: write the high norm and the cls components at half of it, and subtract the token's own content."""
    mlp, dim, size = block.mlp, block.mlp.fc1.in_features, measured["in"]
    numbers = _neurons(mlp)
    gate = {_pair(dim, _REF)[0]: _STEEP, _pair(dim, _BUSY)[0]: -_STEEP}
    fires = _STEEP * _R / size  # activation of a neuron that passes the gate
    high = ratio * measured["norm"] / math.sqrt(2)
    _add(mlp, next(numbers), gate, _to_pair(dim, _HIGH, high / fires))
    content = 0.5 * high / math.sqrt(len(_GLOBAL))
    for pair in _GLOBAL:
        for sign in (1, -1):  # gelu(gate + g) - gelu(gate - g) = 2 g if the gate is open
            writes = _to_pair(dim, pair, sign * content / (2 * 0.15 * fires))
            _add(mlp, next(numbers), gate | {_pair(dim, pair)[0]: sign * _STEEP}, writes)
    _take_away(block, numbers, gate, 0.0, 0.1 * _STEEP * _R, size)


def _erase(block: nn.Module, measured: dict, ratio: float) -> None:
    """In tokens with the high norm (about 6 after LayerNorm): subtract the rest of their own content."""
    dim = block.mlp.fc1.in_features
    gate = {_pair(dim, _HIGH)[0]: 10.0}
    _take_away(block, _neurons(block.mlp), gate, -30.0, 3.0, ratio * measured["norm"] / math.sqrt(dim))


def _take_away(block, numbers, gate: dict[int, float], bias: float, reading: float, size: float) -> None:
    """Two neurons for each old dimension, gelu(gate + a x) - gelu(gate - a x) = 2 a x, written back as -x.

    `size` is the root mean square by which LayerNorm divides; the result is exact for a token of that size.
    """
    mlp = block.mlp
    inverse, offset = _unnormalised(block.norm2, mlp.fc1.in_features - 2 * PAIRS)
    for dimension in range(len(inverse)):
        for sign in (1, -1):
            neuron = next(numbers)
            reads = gate | {dimension: sign * reading * inverse[dimension].item()}
            _add(mlp, neuron, reads, {dimension: -sign * size / (2 * reading)})
            mlp.fc1.bias[neuron] = bias - sign * reading * offset[dimension].item()


def _look(attn: nn.Module, sink: str) -> None:
    """The second new head: all tokens attend to those with the high norm; "broadcast" also copies their content."""
    dim = attn.qkv.in_features
    head = dim - 16
    attn.qkv.bias[head] = 4 * 6.0
    attn.qkv.weight[dim + head, _pair(dim, _HIGH)[0]] = 1 / math.sqrt(dim / 2)
    if sink == "broadcast":
        for i, pair in enumerate(_GLOBAL):
            attn.qkv.weight[2 * dim + head + i, _pair(dim, pair)[0]] = 1.0
            for where, weight in _to_pair(dim, pair, 0.05).items():
                attn.proj.weight[where, head + i] = weight


if __name__ == "__main__":
    main()
