"""What the optimiser of a training acts on, and how registers start."""

import pytest
import torch

from vitreg_lib.train import loop, parallel


@pytest.mark.parametrize("recipe", ["deit3", "clip", "dinov2", "lejepa", "mae", "emergence"])
def test_registers_start_apart_and_without_weight_decay(recipe):
    config, module = loop.configure(recipe, registers=4, register_start=0.3)
    torch.manual_seed(0)
    trained = module.build(config)
    optimizer = parallel.optimizer(trained, config, "cpu")
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = [name for name, p in trained.named_parameters() if id(p) in decayed]
    assert any(name.endswith("mlp.fc1.weight") for name in names)
    assert not [name for name in names if name.endswith(("reg_token", "cls_token", "pos_embed"))]
    registers = module.backbone(trained).reg_token[0]
    unit = torch.nn.functional.normalize(registers, dim=1)
    assert (unit @ unit.T).fill_diagonal_(-1).max() < 0.9
    assert 0.2 < registers.std() < 0.4
