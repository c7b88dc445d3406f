"""timm's Muon with matrices of one shape stacked: on a GPU a few large operations in place of many small ones."""

import inspect
from collections import defaultdict

import torch
from timm.optim import muon

SETTINGS = [p.name for p in inspect.signature(muon.muon).parameters.values() if p.kind is p.KEYWORD_ONLY]


class Muon(muon.Muon):
    """The same steps as timm's, up to rounding. timm's own first step says which parameters are matrices."""

    @torch.no_grad()
    def step(self, closure=None):
        """One step, after which the gradients of matrices are None."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None and self.state[p].get("use_muon"):
                    alike[p.flatten(1).shape].append(p)
            for matrices in alike.values():
                _step(matrices, [self.state[p]["momentum_buffer"] for p in matrices], group)
        return super().step(closure)


def _step(matrices: list[torch.Tensor], momenta: list[torch.Tensor], group: dict) -> None:
    """timm's step of matrices of one shape, given to it as one convolution, whose places it treats one by one."""
    settings = {name: group[name] for name in SETTINGS} | {"conv_mode": "batched", "normalize_spatial": False}
    kinds = (matrices, [p.grad for p in matrices], momenta)
    stacks = [torch.stack([t.flatten(1) for t in kind]).movedim(0, 2) for kind in kinds]
    muon.muon(*([stack] for stack in stacks), **settings)
    for kind, stack in ((matrices, stacks[0]), (momenta, stacks[2])):
        torch._foreach_copy_(kind, [s.view(t.shape) for s, t in zip(stack.unbind(2), kind, strict=True)])
    for p in matrices:
        p.grad = None
