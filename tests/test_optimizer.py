"""The optimiser of a training, and what a GPU is given in larger portions than a CPU."""

import pytest
import torch
from timm.optim.muon import Muon as Timm
from torch import nn

from vitreg_lib.train import images, loop, parallel
from vitreg_lib.train.config import TrainConfig
from vitreg_lib.train.muon import Muon


def test_together_as_one_by_one():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Conv2d(3, 8, 4), nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 24)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [kind(model.parameters(), lr=0.01, weight_decay=0.1) for kind, model in zip((Timm, Muon), models)]
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    moved = 0.0
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
        moved += (one - other).abs().sum().item()
    states = [sorted(len(s) for s in o.state_dict()["state"].values()) for o in optimizers]
    assert states[0] == states[1]


def test_scenes_rendered_ahead_are_those_of_their_step(monkeypatch):
    config = TrainConfig(batch_size=6, image_size=64, steps=5)
    wanted = [images.rendered(config, step, "cpu") for step in range(5)]
    monkeypatch.setattr(images, "AHEAD", 13)
    real = images.scenes.render
    counts = []

    def render(index, size, seed, device):
        counts.append(len(index))
        return real(index, size, seed)

    monkeypatch.setattr(images.scenes, "render", render)
    for part in range(5):
        batch = images.rendered(config, part, "meta")
        assert torch.equal(batch.pixels, wanted[part].pixels)
        assert batch.captions() == wanted[part].captions()
    assert counts == [12, 12, 6]
    with parallel.micro_batch(1, 2):
        assert torch.equal(images.rendered(config, 1, "meta").pixels, wanted[1].pixels[3:])


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
