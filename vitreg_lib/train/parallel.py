"""One training in several processes: the images of each process, and the exchange of tensors.

Started by `torchrun --nproc-per-node N`, every process (rank) computes its share of each batch. At step s the global
batch is the images [s·B, (s+1)·B); rank r of W takes the r-th of W equal parts, and micro-batch k of K (gradient
accumulation) the k-th part of that. Gradients are averaged over ranks. A loss that is a mean over images needs nothing
more. A loss that compares images with each other is computed from `gather`ed tensors, equal on every rank. Without
torchrun there is one rank, and all functions here are the identity.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from ..base import UserError, line, local_rank
from ..hooks.anatomy import cuts_patches

_part = (0, 1)  # (current micro-batch, number of micro-batches); set by `micro_batch` alone
_fixed: torch.Tensor | None = None  # what `positions` gives while a step is captured; set by `fixed_positions` alone


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _many() else 0


def world() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if _many() else 1


def batch_range(config, step: int) -> range:
    """Indices of the images that this process computes now: the micro-batch of its part of the batch of `step`.

    Raises UserError where `config.batch_size` does not split evenly over the processes.
    """
    share, rest = divmod(config.batch_size, world())
    if rest:
        raise UserError(f"a batch of {config.batch_size} does not split over {world()} processes; choose a multiple")
    first = step * config.batch_size + rank() * share
    part, parts = _part
    return range(first + part * share // parts, first + (part + 1) * share // parts)


def positions(config, step: int, device) -> torch.Tensor:
    """`batch_range` as a tensor (n,) on the device; a loss that is captured as a CUDA graph finds its images by it."""
    if _fixed is not None:
        return _fixed
    mine = batch_range(config, step)
    return torch.arange(mine.start, mine.stop, device=device)


@contextlib.contextmanager
def fixed_positions(held: torch.Tensor):
    """A context in which `positions` gives the tensor `held`, whose content changes from step to step."""
    global _fixed
    _fixed = held
    try:
        yield
    finally:
        _fixed = None


def capturing() -> bool:
    """Whether `positions` are fixed, because a step is being captured."""
    return _fixed is not None


def following(config, step: int) -> Iterator[range]:
    """The values of `batch_range` from now to the end of the training, one for each micro-batch."""
    part, parts = _part
    while step < config.steps:
        with micro_batch(part, parts):
            wanted = batch_range(config, step)
        yield wanted
        part = (part + 1) % parts
        step += part == 0


@contextlib.contextmanager
def micro_batch(part: int, parts: int):
    """A context in which `batch_range` gives the `part`-th of `parts` micro-batches."""
    global _part
    before, _part = _part, (part, parts)
    try:
        yield
    finally:
        _part = before


def gather(x: torch.Tensor) -> torch.Tensor:
    """(world · n, …) from every rank's (n, …), in the order of ranks, with gradient.

    The gradient that all ranks' losses send to this rank's rows is summed. Where every rank computes the same loss from
    gathered tensors, that is W times too much; averaging the gradients over ranks corrects it.
    """
    if not _many():
        return x
    from lightly.utils.dist import gather

    return torch.cat(gather(x.contiguous()))


@torch.no_grad()
def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, without gradient."""
    if _many():
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def start(device: str) -> str:
    """Join the processes that torchrun started, if any; return this one's device (`cuda` becomes `cuda:LOCAL_RANK`).

    Communication is by nccl on GPUs and by gloo on CPUs.
    """
    if local_rank() is None or _many():
        return device
    if device == "cuda":
        device = f"cuda:{local_rank()}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def stop() -> None:
    """Leave the group, if there is one."""
    if _many():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if _many():
        dist.barrier()


def _many() -> bool:
    return dist.is_available() and dist.is_initialized()


class Loss(nn.Module):
    """A recipe's loss as a forward: step → (loss, numbers); in bfloat16 where the device is a GPU."""

    def __init__(self, module: nn.Module, recipe, config, device: str):
        super().__init__()
        self.module, self.recipe, self.config, self.device = module, recipe, config, device

    def forward(self, step: int):
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.device(self.device).type == "cuda"):
            value, numbers = self.recipe.loss(self.module, self.config, step, self.device)
        return value, {name: torch.as_tensor(number).detach() for name, number in numbers.items()}


def blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of all towers inside a module, in timm's and in open_clip's naming."""
    lists = (getattr(m, name, None) for m in module.modules() for name in ("blocks", "resblocks"))
    return [block for modules in lists if isinstance(modules, (nn.Sequential, nn.ModuleList)) for block in modules]


def compile_blocks(module: nn.Module, device: str) -> None:
    """Compile every block in place, since blocks take most of the time, where this machine can compile."""
    if not compiles(device):
        return
    modules = blocks(module)
    # blocks differ in their rate of stochastic depth alone, and are called with and without gradient
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(modules))
    for block in modules:
        block.compile(dynamic=False)
    for part in module.modules() if torch.device(device).type == "cuda" else ():
        if type(part) is nn.Conv2d and cuts_patches(part):
            part.__class__ = Patches


class Patches(nn.Conv2d):
    """A convolution of separate patches as a product of matrices; a GPU is three times as quick at it."""

    def forward(self, x):
        """(n, dim, rows, cols) of images (n, channels, height, width)."""
        x = x.unflatten(3, (-1, self.kernel_size[1])).unflatten(2, (-1, self.kernel_size[0]))
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


@functools.cache
def compiles(device) -> bool:
    """Whether torch.compile works here, by a forward and backward pass of a small function; else a warning says why."""
    try:
        torch.compile(lambda x: x.sin().sum())(torch.zeros(8, device=device, requires_grad=True)).backward()
    except Exception as error:  # any error of the compiler, the driver or the tool chain
        warnings.warn(f"torch.compile does not work here, going on without: {line(error)}", stacklevel=3)
        return False
    return True


def eager(config):
    """A context without compiled code: hooks are called at every block, and new shapes start no compilation."""
    return torch.compiler.set_stance("force_eager") if config.compile else contextlib.nullcontext()


def shard(module: nn.Module) -> None:
    """FSDP2: distribute parameters, gradients and optimiser state over ranks; blocks are gathered when needed.

    With lamb and sgd, tests show the same training as without FSDP. With muon, which works in bfloat16, it differs a
    little: on two CPUs the loss after a step was 16.2722 instead of 16.2715.
    """
    from torch.distributed.fsdp import fully_shard

    if world() == 1:
        raise UserError("--fsdp shares a model out over processes: start it with torchrun --nproc-per-node N")
    for part in (*blocks(module), module):
        fully_shard(part)


def distribute(loss: Loss, config) -> nn.Module:
    """The loss under DDP, where several processes train without FSDP."""
    if world() == 1 or config.fsdp:
        return loss
    return nn.parallel.DistributedDataParallel(loss, broadcast_buffers=False)


def optimizer(module: nn.Module, config, device: str) -> torch.optim.Optimizer:
    """timm's optimiser of that name, on a GPU with a fused step, and one that a CUDA graph can hold, where it has them.

    Vectors have no weight decay, nor do the parameters that a ViT excludes: positions, cls token, registers.
    """
    from timm.optim import create_optimizer_v2, param_groups_weight_decay

    from .muon import Muon

    parts = [(prefix, part) for prefix, part in module.named_modules() if hasattr(part, "no_weight_decay")]
    kept = [f"{prefix}.{name}".lstrip(".") for prefix, part in parts for name in part.no_weight_decay()]
    groups = param_groups_weight_decay(module, config.weight_decay, no_weight_decay_list=kept)
    options = dict(opt=config.optimizer, lr=config.learning_rate)
    if torch.device(device).type == "cuda":
        if world() == 1:  # a graph reads the learning rate from the device
            for group in groups:
                group["lr"] = torch.tensor(config.learning_rate, device=device)
            if config.optimizer == "muon":
                return Muon(groups, capturable=True)
            with contextlib.suppress(TypeError, RuntimeError, ValueError):
                return create_optimizer_v2(groups, **options, fused=True, capturable=True)
            for group in groups:
                del group["lr"]
        with contextlib.suppress(TypeError, RuntimeError):
            return create_optimizer_v2(groups, **options, fused=True)
    try:
        return create_optimizer_v2(groups, **options)
    except ValueError as error:
        raise UserError(f"unknown optimiser {config.optimizer!r}: adamw, lamb, sgd or another of timm's") from error


def without_sync(wrapped: nn.Module, last: bool):
    """A context in which gradients are only summed; at the last micro-batch they are averaged over ranks."""
    if hasattr(wrapped, "set_requires_gradient_sync"):  # FSDP2
        wrapped.set_requires_gradient_sync(last)
    elif hasattr(wrapped, "no_sync") and not last:  # DDP
        return wrapped.no_sync()
    return contextlib.nullcontext()


def whole(module: nn.Module, run) -> nn.Module | None:
    """The module with whole tensors: itself, or under FSDP a copy on rank 0 and None on the others (collective)."""
    tensors = gathered(module.state_dict()) if run.config.fsdp else {}
    if rank():
        return None
    if run.config.fsdp:
        module = run.recipe.build(run.config)
        module.load_state_dict(tensors)
    return module.to(run.device)


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors by name, on the CPU of rank 0; empty on the other ranks (collective under FSDP)."""
    kept = {}
    for name, value in tensors.items():
        value = full(value.detach())  # all ranks take part
        if rank() == 0:
            kept[name] = value.cpu().contiguous()
    return kept


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor: itself, or gathered from the ranks under FSDP (collective)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
