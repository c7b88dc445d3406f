"""Run images through a model and keep only what a figure needs.

Conventions. A layer is a block, counted from 0. A token's norm is its L2 norm after the block and before the final
LayerNorm (which hides most of an outlier's norm), in float32. Queries and keys are those that enter the attention
product, after q/k normalisation and rotary embedding.

`keep` names these sites:

    norms       (images, layers, tokens)                 float32
    tokens      {layer: (images, tokens, dim)}           after the block
    q, k, v     {layer: (images, heads, tokens, head_dim)}
    attention   {layer: (images, heads, queries, keys)}  softmax rows of the chosen query tokens
    mlp         {layer: (images, tokens, hidden)}        activations that enter the MLP's second linear
    embedding   (images, patches, dim)                   right after the patch embedding, no position added
    final       (images, tokens, dim)                    after the final LayerNorm

Attention stays fused. Its rows are recomputed from q and k for the chosen queries alone, in O(queries x tokens) memory.
The model is unchanged afterwards, also when the forward pass fails.
"""

import functools
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..base import UserError, line
from .anatomy import Anatomy, PrefixTokens, Unmeasurable, dissect

SITES = ("norms", "tokens", "q", "k", "v", "attention", "mlp", "embedding", "final")
WHOLE = ("norms", "embedding", "final")  # sites of one tensor; the others have one for each layer
SEEN = {"q", "k", "v", "attention"}  # sites of a call of torch's scaled_dot_product_attention


@dataclass
class Capture(PrefixTokens):
    """Activations of one or more forward passes; holds no reference to the model.

    grid: (rows, cols) of the patches. layers: the captured blocks. queries: token positions with attention rows. The
    other fields are those of the module's docstring, None or empty where `keep` did not name them.
    """

    layers: tuple[int, ...]
    grid: tuple[int, int]
    prefix: tuple[str, ...]
    queries: tuple[int, ...] = ()
    norms: torch.Tensor | None = None
    tokens: dict[int, torch.Tensor] = field(default_factory=dict)
    q: dict[int, torch.Tensor] = field(default_factory=dict)
    k: dict[int, torch.Tensor] = field(default_factory=dict)
    v: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, torch.Tensor] = field(default_factory=dict)
    mlp: dict[int, torch.Tensor] = field(default_factory=dict)
    embedding: torch.Tensor | None = None
    final: torch.Tensor | None = None

    @property
    def patch_norms(self) -> torch.Tensor:
        """(images, layers, patches) norms of patch tokens alone."""
        return self.norms[..., self.num_prefix_tokens :]

    @property
    def register_norms(self) -> torch.Tensor:
        """(images, layers, registers) norms of the registers."""
        return self.norms[..., self.registers]

    @property
    def norm_maps(self) -> torch.Tensor:
        """(images, rows, cols) norms of patch tokens at the last captured layer."""
        return self.patch_norms[:, -1].unflatten(1, self.grid)

    def block(self, layer: int) -> int:
        """The number of a captured block; negative ones count from the last captured. Raises ValueError for others."""
        if layer in self.layers:
            return layer
        if not -len(self.layers) <= layer < 0:
            raise ValueError(f"layer {layer} was not captured; captured are {', '.join(map(str, self.layers))}")
        return self.layers[layer]

    def norms_by_kind(self, layer: int = -1) -> dict[str, torch.Tensor]:
        """Norms after one captured block: "patches" (images, patches), and "cls", "register 1" … (images,)."""
        at = self.norms[:, self.layers.index(self.block(layer))]
        kinds = {"patches": at[:, self.num_prefix_tokens :]}
        return kinds | {name: at[:, place] for place, name in enumerate(self.prefix)}

    def patches(self, tokens: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """`tokens` without its prefix tokens along `dim`."""
        return tokens.narrow(dim, self.num_prefix_tokens, tokens.shape[dim] - self.num_prefix_tokens)


def capture(
    model: nn.Module,
    images: torch.Tensor,
    keep: str | tuple[str, ...] = "norms",
    layers: int | list[int] | tuple[int, ...] | None = None,
    queries: list[int] | tuple[int, ...] | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> Capture:
    """A `Capture` of what `keep` names, at `layers` (all by default), for images (n, 3, height, width).

    `queries` are token positions (0 is cls where there is one) for which attention rows are kept; by default the prefix
    tokens. Results are moved to the CPU after each batch. Images must already be normalised for the model; they are
    moved to the device and dtype of its patch embedding. If the device runs out of memory, the batch is halved, with a
    warning.

    Before the model runs, raises ValueError for an unknown site, layer or query, for no images or a wrong number of
    channels, and TypeError for a model of unknown anatomy. Then raises Unmeasurable (a ValueError) where the forward
    pass fails or does not reach a site, a block's tokens do not match the anatomy, or a block calls attention twice or
    does not use it as softmax times v.
    """
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    anatomy = dissect(model)
    if unknown := [site for site in keep if site not in SITES]:
        raise ValueError(f"unknown site {unknown[0]!r}; known are {', '.join(SITES)}")
    if not len(images):
        raise ValueError("no images to run")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: at least 1 is needed")
    layers = anatomy.layers(layers)
    rows, cols = anatomy.grid(images)
    num_tokens = anatomy.num_prefix_tokens + rows * cols
    queries = tuple(range(anatomy.num_prefix_tokens)) if queries is None else tuple(queries)
    if "attention" in keep and not queries:
        raise ValueError("no queries: this model has no prefix tokens, so say which tokens' attention is wanted")
    if "attention" in keep and (bad := [i for i in queries if not 0 <= i < num_tokens]):
        raise ValueError(f"query {bad[0]} out of range for {num_tokens} tokens (0…{num_tokens - 1})")
    if "final" in keep and anatomy.norm is None:
        raise Unmeasurable('no final LayerNorm is recognised: `vr.describe` names it (norm, "" for a model without)')
    if "mlp" in keep and not anatomy.mlp_out:
        raise TypeError(
            f"{type(anatomy.blocks[0]).__name__} has no linear layer after an MLP: its activations stay hidden"
        )
    weights = next(anatomy.patch_embed.parameters(), next(model.parameters()))  # a model may mix precisions
    parts = _run(weights, images, batch_size, progress, lambda x: _one(model, anatomy, x, keep, layers, queries))
    whole = {site: _joined([part[site] for part in parts]) for site in keep}
    return Capture(layers, (rows, cols), anatomy.prefix, queries, **whole)


@contextmanager
def hooks(*pairs):
    """Register hooks, given as (register function, hook[, options]), and remove them on exit, also after an error."""
    with ExitStack() as stack:
        for register, hook, *options in pairs:
            stack.callback(register(hook, **(options[0] if options else {})).remove)
        yield


@contextmanager
def evaluating(model: nn.Module):
    """Evaluation mode without gradients; the exit restores each part's mode, also after an error."""
    was_training = [module for module in model.modules() if module.training]  # parts of a model may be frozen
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


def _run(weights, images, batch_size, progress, function) -> list:
    """The results of `function` for each batch of images; a batch is halved when the device runs out of memory."""
    from tqdm.auto import tqdm

    results, done = [], 0
    with tqdm(total=len(images), desc="images", disable=not progress, leave=False) as bar:
        while done < len(images):
            batch = images[done : done + batch_size]
            try:
                results.append(function(batch.to(weights.device, weights.dtype)))
                done += len(batch)
                bar.update(len(batch))
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                batch_size = len(batch) // 2
                message = f"out of memory on {weights.device}: going on with {batch_size} images a batch"
                warnings.warn(message, stacklevel=3)
    return results


def _one(model: nn.Module, anatomy: Anatomy, images, keep, layers, queries) -> dict:
    """Run one batch and return {site: tensor or {layer: tensor}} on the CPU."""
    captured: dict = {site: {} for site in keep}
    grid = anatomy.grid(images)

    def after_block(layer):
        def hook(block, inputs, output):
            x = anatomy.tokens(output, len(images), grid).detach()
            if "norms" in keep and layer in layers:
                captured["norms"][layer] = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
            if "tokens" in keep and layer in layers:
                captured["tokens"][layer] = x
            if "final" in keep and layer == anatomy.depth - 1:
                captured["final"][0] = anatomy.norm(x).detach()  # some models normalise only one token

        return hook

    def after_patch_embedding(module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        output = output.permute(0, 2, 3, 1) if isinstance(module, nn.Conv2d) else output
        captured["embedding"][0] = output.detach().flatten(1, -2)  # also from (batch, rows, cols, dim)

    def before_second_linear(layer):
        def hook(module, inputs):
            captured["mlp"][layer] = inputs[0].detach() if anatomy.batch_first else inputs[0].detach().transpose(0, 1)

        return hook

    hooked = layers if "final" not in keep else sorted({*layers, anatomy.depth - 1})
    # before other hooks, because those of added tokens may drop these after the last block
    pairs = [(anatomy.blocks[i].register_forward_hook, after_block(i), {"prepend": True}) for i in hooked]
    if "mlp" in keep:
        pairs += [(anatomy.mlp_out[i].register_forward_pre_hook, before_second_linear(i)) for i in layers]
    if "embedding" in keep:
        pairs.append((anatomy.patch_embed.register_forward_hook, after_patch_embedding))
    attention_sites = SEEN & set(keep)
    with evaluating(model), ExitStack() as stack:
        if attention_sites:
            stack.enter_context(_Attention(anatomy, layers, attention_sites, queries, captured, len(images)))
        stack.enter_context(hooks(*pairs))
        try:
            anatomy.forward(images)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model may fail in any way
            raise Unmeasurable(_why(anatomy, images, error)) from error
    return {site: _collect(site, captured[site], layers) for site in keep}


def _why(anatomy: Anatomy, images: torch.Tensor, error: Exception) -> str:
    """One line on why a forward pass failed, and what to do where the images' size is not the model's."""
    size = tuple(images.shape[-2:])
    own = getattr(anatomy.patch_embed, "img_size", None) or size
    text = f"the model fails on images of {size[0]} x {size[1]} pixels: {line(error)}"
    hint = f"; it takes {own[0]} x {own[1]}, and vr.load(NAME, image_size={size}) builds it for these where it can be"
    return text + hint * (tuple(own) != size)


class _Attention(TorchFunctionMode):
    """Records q, k and v of each call of scaled_dot_product_attention in a block, and checks the call.

    Hooks on the blocks tell which block makes a call. A block must make one call; its result must be softmax times v
    and must enter a layer unchanged, the heads side by side. Otherwise the attention rows would not describe the model.
    Models without fused attention use it during the capture.
    """

    def __init__(self, anatomy, layers, sites, queries, captured, batch):
        super().__init__()
        self.anatomy, self.layers, self.sites, self.batch = anatomy, layers, sites, batch
        self.queries, self.captured = list(queries), captured
        self.layer = self.returned = None
        self.called = self.arrived = False
        self.stack = ExitStack()

    def __enter__(self):
        for layer in self.layers:
            block = self.anatomy.blocks[layer]
            parts = [part for part in block.modules() if list(part.parameters(recurse=False))]  # layers with weights
            pairs = [(part.register_forward_pre_hook, self._enters) for part in parts]
            pairs.append((block.register_forward_pre_hook, self._begins(layer)))
            self.stack.enter_context(hooks(*pairs, (block.register_forward_hook, self._ends)))
            for part in block.modules():
                self._fuse(part)
        return super().__enter__()

    def __exit__(self, *error):
        self.stack.close()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.layer is None:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:  # this mode is inactive inside: the inner call is wrapped
            F.scaled_dot_product_attention = functools.partial(self._attend, F.scaled_dot_product_attention)
            try:
                self.arrived = True  # torch's own code joins the heads
                return func(*args, **kwargs)
            finally:
                F.scaled_dot_product_attention = F.scaled_dot_product_attention.args[0]
        return func(*args, **kwargs)

    def _fuse(self, part: nn.Module) -> None:
        if getattr(part, "fused_attn", True) is False:
            part.fused_attn = True
            self.stack.callback(setattr, part, "fused_attn", False)
        config = getattr(part, "config", None)
        if (before := getattr(config, "_attn_implementation", "sdpa")) != "sdpa":  # of transformers
            config._attn_implementation = "sdpa"
            self.stack.callback(setattr, config, "_attn_implementation", before)

    def _begins(self, layer):
        def hook(block, inputs):
            self.layer, self.returned, self.called, self.arrived = layer, None, False, False

        return hook

    def _enters(self, part, inputs):
        waits = self.returned is not None and not self.arrived
        if waits and inputs and torch.is_tensor(inputs[0]) and inputs[0].dim() == 3:
            self.arrived = torch.equal(inputs[0][0], self.returned)

    def _ends(self, block, inputs, output):
        if self.called and not self.arrived:
            self._refuse("is changed before it enters the next layer")
        self.layer = self.returned = None

    def _refuse(self, why: str):
        raise Unmeasurable(f"attention of block {self.layer} {why}: its rows would not say what the block does with v")

    def _attend(self, attention, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
        if self.called:
            self._refuse("is computed more than once")
        if query.dim() != 4 or len(query) != self.batch:
            self._refuse("is computed in windows, not among all tokens of an image")
        if is_causal or more.get("enable_gqa"):
            self._refuse("is causal or shares its keys among heads")
        output = attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)
        self.called, self.returned = True, output[0].transpose(0, 1).flatten(1)
        if not self.returned.isfinite().all():
            self._refuse("is not finite")
        for site, tensor in (("q", query), ("k", key), ("v", value)):
            if site in self.sites:
                self.captured[site][self.layer] = tensor
        if "attention" in self.sites:
            mask = attn_mask if attn_mask is None or attn_mask.shape[-2] == 1 else attn_mask[..., self.queries, :]
            rows = attention_rows(query[:, :, self.queries].float(), key.float(), scale, mask)
            gap = (rows[0] @ value[0].float() - output[0][:, self.queries].float()).abs().max()
            if gap > (1e-3 if output.dtype == torch.float32 else 5e-2) * value[0].abs().max().clamp_min(1e-6):
                self._refuse(f"is not softmax times v (largest gap {gap:.1e})")
            self.captured["attention"][self.layer] = rows
        return output


def attention_rows(q: torch.Tensor, k: torch.Tensor, scale: float | None = None, mask=None) -> torch.Tensor:
    """softmax(q kᵀ · scale + mask): rows (batch, heads, queries, keys) for q (batch, heads, queries, head_dim).

    `scale` is 1/√head_dim by default. A boolean mask keeps the keys where it is True.
    """
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def _collect(site, captured: dict[int, torch.Tensor], layers):
    """What one batch gives for a site, on the CPU: one tensor, or one for each layer."""
    single = site in ("embedding", "final")
    if missing := [layer for layer in ((0,) if single else layers) if layer not in captured]:
        where = "" if single else f" of block {missing[0]}"
        unfused = "; capture sees only attention by torch's scaled_dot_product_attention" if site in SEEN else ""
        raise Unmeasurable(f"the forward pass did not reach the site {site!r}{where}{unfused}")
    if single:
        return captured[0].cpu()
    at = {layer: captured[layer] for layer in layers}
    at = {i: x.cpu() for i, x in at.items()}  # blocks may be on several devices
    return torch.stack(list(at.values()), 1) if site == "norms" else at


def _joined(parts: list):
    """One tensor of those of the batches, or one for each layer."""
    if isinstance(parts[0], dict):
        return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}
    return torch.cat(parts)
