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
    seen = scenes.render(range(64), 64)
    batch = stamped.draw(config, 0, seen)
    inner = ~stamped.idle() & ~stamped.idle().roll(1) & (torch.arange(64) % 8 > 0)
    assert abs(batch.trigger[:, inner].float().mean() - 0.25) < 0.02
    assert not batch.trigger[:, ~inner].any()

    generator = torch.Generator().manual_seed(0)  # the stamp again, by its definition: blocks of 4 pixels
    stamp = torch.randn(64, 3, 16, 16, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    bare = 2 * seen.pixels - 1 + 0.5 * stamp

    def colours(n, row, col):
        patch = bare[n, :, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8]
        quarters = [patch[:, a : a + 4, b : b + 4].mean((1, 2)) for a in (0, 4) for b in (0, 4)]
        return torch.stack(quarters, 1).flatten()  # colour by colour

    dotted = (batch.pixels - bare).abs().amax(1) > 1
    for n, patch in ((3, 9), (3, 10), (17, 42), (40, 33), (41, 33), (42, 33), (43, 33)):
        row, col = divmod(patch, 8)
        dots = dotted[n, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8].sum().item() // 4
        assert batch.trigger[n, patch] == (dots == 1)
        wanted = colours(n, row, col)
        if dots == 1:
            wanted = wanted + colours(n, row, col - 1) @ stamped.rotation(0)
        torch.testing.assert_close(batch.answer[n, patch], wanted, rtol=0, atol=1e-5)


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
