"""Training steps that a GPU takes without being waited for: a step as one CUDA graph, numbers that are read later."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import parallel
from .state import Run


@dataclass
class Numbers:
    """A step's numbers by name, averaged over images, on their way from the device."""

    names: list[str]
    values: torch.Tensor

    def __post_init__(self):
        self.arrived = torch.cuda.Event() if self.values.is_cuda else None
        self.values = self.values.to("cpu", non_blocking=True)
        if self.arrived:
            self.arrived.record()

    def read(self) -> dict[str, float]:
        """The numbers, once they have arrived."""
        if self.arrived:
            self.arrived.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


def possible(run: Run) -> bool:
    """Whether a step of this training can be one CUDA graph."""
    return (
        run.on_gpu
        and getattr(run.recipe, "GRAPH", False)
        and not run.config.data
        and parallel.world() == run.accumulate == 1
        and all(group.get("capturable") for group in run.optimizer.param_groups)
    )


def capture(take: Callable[[], tuple], config, step: int, device) -> Callable[[int], tuple]:
    """`take`, which computes a step and returns tensors, as a function of the step that launches one CUDA graph.

    A step before must have made the optimiser's state and freed the gradients.
    """
    positions = parallel.positions(config, step, device)
    graph = torch.cuda.CUDAGraph()
    with parallel.fixed_positions(positions), torch.cuda.graph(graph):
        result = take()

    def replay(step: int):
        positions.copy_(parallel.positions(config, step, device))
        graph.replay()
        return result

    return replay
