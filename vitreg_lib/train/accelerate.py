"""What makes a training fast or spread over processes, apart from what is learnt: compile, DDP, FSDP2, fused optimiser.

DDP and FSDP act on a module's forward, while a recipe's loss calls whatever parts it likes. So the loss itself is made
the forward of a module, `Loss`, and that is what they wrap.
"""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch import nn

from ..errors import UserError
from . import parallel
from .state import full


class Loss(nn.Module):
    """A recipe's loss as a forward: step → (loss, numbers); in bfloat16 where the device is a GPU."""

    def __init__(self, module: nn.Module, recipe, config, device: str):
        super().__init__()
        self.module, self.recipe, self.config, self.device = module, recipe, config, device

    def forward(self, step: int):
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.device(self.device).type == "cuda"):
            return self.recipe.loss(self.module, self.config, step, self.device)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of all towers inside a module, in timm's and in open_clip's naming."""
    lists = (getattr(m, name, None) for m in module.modules() for name in ("blocks", "resblocks"))
    return [block for found in lists if isinstance(found, (nn.Sequential, nn.ModuleList)) for block in found]


def compile_blocks(module: nn.Module, device: str) -> bool:
    """Compile every block in place (their forward is where the time goes); False, with a warning, if that fails.

    A trial on the first block, forward and backward, shows whether this machine can.
    """
    found = blocks(module)
    # blocks differ in their rate of stochastic depth alone, and are called with and without gradient
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(found))
    for block in found:
        block.compile(dynamic=False)
    dim = next(p.shape[0] for name, p in found[0].named_parameters() if name.endswith("norm1.weight"))
    try:
        found[0](torch.zeros(2, 8, dim, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # whatever the compiler, the driver or the tool chain raises
        for block in found:
            block._compiled_call_impl = None  # what nn.Module.compile sets; it has no public inverse
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"torch.compile does not work here, going on without: {reason}", stacklevel=2)
        return False
    finally:
        module.zero_grad(set_to_none=True)
    return True


def eager(config):
    """Inside, nothing runs compiled: hooks see every block, and other shapes compile nothing anew."""
    return torch.compiler.set_stance("force_eager") if config.compile else contextlib.nullcontext()


def shard(loss: nn.Module) -> None:
    """FSDP2: parameters, gradients and optimiser state shared out over ranks, gathered block by block when needed.

    Tested to train as without it with lamb and sgd. With muon, which works in bfloat16, it nearly does: on two CPUs the
    loss after a step was 16.2722 instead of 16.2715.
    """
    from torch.distributed.fsdp import fully_shard

    if parallel.world() == 1:
        raise UserError("--fsdp shares a model out over processes: start it with torchrun --nproc-per-node N")
    for block in blocks(loss):
        fully_shard(block)
    fully_shard(loss)


def distribute(loss: Loss, config) -> nn.Module:
    """The loss under DDP, where several processes train and FSDP does not see to it."""
    if parallel.world() == 1 or config.fsdp:
        return loss
    return nn.parallel.DistributedDataParallel(loss, broadcast_buffers=False)


def optimizer(module: nn.Module, config, device: str) -> torch.optim.Optimizer:
    """timm's optimiser of that name, with a fused step on a GPU where it has one."""
    from timm.optim import create_optimizer_v2

    options = dict(opt=config.optimizer, lr=config.learning_rate, weight_decay=config.weight_decay)
    if torch.device(device).type == "cuda":
        with contextlib.suppress(TypeError, RuntimeError):
            return create_optimizer_v2(module, **options, fused=True)
    try:
        return create_optimizer_v2(module, **options)
    except ValueError as error:
        raise UserError(f"unknown optimiser {config.optimizer!r}: adamw, lamb, sgd or another of timm's") from error


def without_sync(wrapped: nn.Module, last: bool):
    """Inside, gradients are only added up; they are averaged over ranks at the last micro-batch."""
    if hasattr(wrapped, "set_requires_gradient_sync"):  # FSDP2
        wrapped.set_requires_gradient_sync(last)
    elif hasattr(wrapped, "no_sync") and not last:  # DDP
        return wrapped.no_sync()
    return contextlib.nullcontext()


def whole(module: nn.Module, recipe, config, device: str) -> nn.Module | None:
    """The module with whole tensors: itself, or under FSDP a copy on rank 0 and None on the others (collective)."""
    own = module.state_dict()
    if not any(hasattr(v, "full_tensor") for v in own.values()):
        return module if parallel.rank() == 0 else None
    gathered = {}
    for name, value in own.items():
        tensor = full(value.detach())
        if parallel.rank() == 0:
            gathered[name] = tensor.cpu()
    if parallel.rank():
        return None
    copy = recipe.build(config)
    copy.load_state_dict(gathered)
    return copy.to(device)
