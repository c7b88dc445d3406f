"""The artificial task on scenes, and many of its models trained side by side: as timm's ViT and torch's AdamW do it."""

import sys

import torch

from vitreg_lib.base import ROOT

sys.path[:0] = [str(ROOT / "workflow"), str(ROOT / "notebooks" / "beyond")]
import stamped  # noqa: E402
import stamped_many  # noqa: E402

from vitreg_lib.data import scenes  # noqa: E402
from vitreg_lib.train import loop  # noqa: E402
from vitreg_lib.train.config import TrainConfig  # noqa: E402


def test_answers_are_own_colours_and_where_marked_the_left_neighbours():
    config = TrainConfig(**stamped.DEFAULTS)
    batch = stamped.draw(config, 0, scenes.render(range(64), 64))
    assert abs(batch.trigger[:, ~stamped.idle()].float().mean() - 0.25 * 53 / 60) < 0.03
    assert not batch.trigger[:, stamped.idle() | stamped.idle().roll(1)].any()
    assert not batch.trigger[:, ::8].any()
    n, patch = batch.trigger.nonzero()[5].tolist()
    bare = stamped.draw(TrainConfig(**stamped.DEFAULTS | {"variant": "single"}), 0, scenes.render(range(64), 64))
    row, col = divmod(patch, 8)
    plain = bare.pixels.clone()  # dots do not count: colours are those under them
    own = [plain[n, :, row * 8 + 4 * a : row * 8 + 4 * a + 4, col * 8 + 4 * b : col * 8 + 4 * b + 4] for a in (0, 1) for b in (0, 1)]
    quiet = (~bare.trigger & ~batch.trigger)[n, 8 * row : 8 * row + 8].nonzero()[:, 0].tolist()
    assert quiet and own
    turned = stamped.rotation(0)
    torch.testing.assert_close(turned @ turned.T, torch.eye(12), atol=1e-5, rtol=0)


def test_many_are_as_one():
    cells = stamped_many.configurations("reg4", steps=4, seeds=2)[::9]
    configs = [c for _, c in cells]
    many, images = stamped_many.Many(configs, "cpu"), stamped_many.Images(configs, "cpu")
    modules = []
    for config in configs:
        torch.manual_seed(config.seed)
        modules.append(stamped.build(config).eval())
    optimizers = [loop.parallel.optimizer(m, c, "cpu") for m, c in zip(modules, configs, strict=True)]
    for step in range(3):
        batch = images.batch(step)
        with torch.no_grad():
            together = many.losses(batch, dropout=0.0)
        many.losses, plain = (lambda b, f=many.losses: f(b, 0.0)), many.losses
        many.step(step, batch)
        many.losses = plain
        for i, (module, optimizer, config) in enumerate(zip(modules, optimizers, configs, strict=True)):
            mine = stamped.Batch(*(x[i] for x in vars(batch).values()))
            optimizer.zero_grad()
            value = stamped._losses(module, config, mine)[1]
            torch.testing.assert_close(together[i], value.detach(), rtol=1e-4, atol=1e-5)
            value.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), config.clip_grad)
            for group in optimizer.param_groups:
                group["lr"] = loop.learning_rate(config, step)
            optimizer.step()
    for i, module in enumerate(modules):
        for name, value in module.named_parameters():
            torch.testing.assert_close(many.weights[name][i].detach(), value.detach(), rtol=0, atol=2e-3)
