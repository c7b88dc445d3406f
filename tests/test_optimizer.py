"""What the optimiser of a training acts on, and how registers start."""

import pytest
import torch
from timm.optim.muon import Muon
from torch import nn

from vitreg_lib.model import mini
from vitreg_lib.train import loop, muon, parallel


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


def test_matrices_of_one_shape_step_together_as_timm_steps_them_one_by_one(monkeypatch):
    """Patch embeddings of any memory layout too; a state is read as timm reads it."""
    stacks = []
    timms = muon.muon.muon
    monkeypatch.setattr(muon.muon, "muon", lambda *args, **options: stacks.append(args) or timms(*args, **options))
    weights = {}
    for kind in (Muon, muon.Muon):
        torch.manual_seed(0)
        model = mini.build("xs").to(memory_format=torch.channels_last)
        optimizer = kind([{"params": [*model.parameters()], "weight_decay": 0.1}], lr=0.01)
        stacks.clear()
        for step in range(5):
            if step == 3:
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.zero_grad()
            model(torch.rand(4, 3, 96, 96, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
        weights[kind] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (48, 16, 4) in {tuple(matrices[0].shape) for matrices, *_ in stacks}, "qkv of four blocks"
    torch.testing.assert_close(weights[muon.Muon], weights[Muon], rtol=1e-3, atol=1e-4)


def test_patches_are_embedded_as_by_the_convolution():
    torch.manual_seed(0)
    embedding = nn.Conv2d(3, 8, (4, 8), stride=(4, 8))
    images = torch.rand(2, 3, 16, 32)
    wanted = embedding(images)
    embedding.__class__ = parallel.Patches
    torch.testing.assert_close(embedding(images), wanted)
