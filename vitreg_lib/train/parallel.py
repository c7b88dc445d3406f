"""Several processes, one training: who takes which images, and how tensors of all processes meet.

Started by `torchrun --nproc-per-node N`, every process (rank) computes its share of each batch. At step s the global
batch is the images [s·B, (s+1)·B); rank r of W takes the r-th of W equal parts, and micro-batch k of K (gradient
accumulation) the k-th part of that. Gradients are averaged over ranks. So a loss that is a mean over images needs
nothing more, and one that compares images with each other computes it from `gather`ed tensors, the same on every rank.
Without torchrun there is one rank, and everything here is the identity.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ..errors import UserError

_part = (0, 1)  # which micro-batch of how many is being computed; set by `micro_batch` alone


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _many() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _many() else 1


def batch_range(config, step: int) -> range:
    """Indices of the images that this process computes now: its part of the batch of `step`, of that a micro-batch.

    Raises UserError where `config.batch_size` does not split evenly over the processes.
    """
    share, rest = divmod(config.batch_size, world())
    if rest:
        raise UserError(f"a batch of {config.batch_size} does not split over {world()} processes; choose a multiple")
    first = step * config.batch_size + rank() * share
    part, parts = _part
    return range(first + part * share // parts, first + (part + 1) * share // parts)


def following(config, step: int) -> Iterator[range]:
    """What `batch_range` gives now and after, micro-batch by micro-batch, to the end of the training."""
    part, parts = _part
    while step < config.steps:
        with micro_batch(part, parts):
            wanted = batch_range(config, step)
        yield wanted
        part = (part + 1) % parts
        step += part == 0


@contextlib.contextmanager
def micro_batch(part: int, parts: int):
    """Inside, `batch_range` gives the `part`-th of `parts` micro-batches."""
    global _part
    before, _part = _part, (part, parts)
    try:
        yield
    finally:
        _part = before


def gather(x: torch.Tensor) -> torch.Tensor:
    """(world · n, …) from every rank's (n, …), in the order of ranks, with gradient.

    The gradient that all ranks' losses send to this rank's rows is summed. Where every rank computes the same loss
    from gathered tensors, that is W times too much, which averaging the gradients over ranks makes right again.
    """
    return _Gather.apply(x) if _many() else x


@torch.no_grad()
def all_reduce_mean(x: torch.Tensor) -> torch.Tensor:
    """Mean over ranks, without gradient."""
    if not _many():
        return x
    return all_reduce_sum(x) / world()


@torch.no_grad()
def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, without gradient."""
    if not _many():
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def start(device: str) -> str:
    """Join the processes that torchrun started, if it did; the device of this one (`cuda` becomes `cuda:LOCAL_RANK`).

    Communication is by nccl on GPUs and by gloo on CPUs.
    """
    if "LOCAL_RANK" not in os.environ or _many():
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if _many():
        dist.barrier()


def _many() -> bool:
    return dist.is_available() and dist.is_initialized()


class _Gather(torch.autograd.Function):
    """all_gather forward; backward sums over ranks and keeps the own rows (all backends have all_reduce)."""

    @staticmethod
    def forward(ctx, x):
        ctx.rows = len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]
