"""The quest's task, its measure of sinks on cases whose answer is known, and the sweep that can be killed."""

from __future__ import annotations

from dataclasses import replace

import emergence as recipe
import emergence_sweep as sweep
import pandas as pd
import pytest
import sinks
import torch

from vitreg_lib.base import UserError
from vitreg_lib.data import images, textures
from vitreg_lib.measure import detection, outliers
from vitreg_lib.model import mend, zoo
from vitreg_lib.train import loop, parallel

VARIANTS = [*sorted(recipe.CHANGES), "decay+dropout+blank-corners"]


def configuration(**options):
    return loop.configure("emergence", **{"variant": "corners", "batch_size": 8, **options})[0]


def patches(pixels):
    """(n, 36, 12) pixels of each patch, by a plain loop."""
    found = torch.zeros(len(pixels), 36, 12)
    for place in range(36):
        row, column = divmod(place, 6)
        found[:, place] = pixels[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_what_a_plain_loop_gives(variant):
    config = configuration(variant=variant)
    batch, task, known = recipe.draw(config, 3), recipe.task(config), recipe.fixed(config.seed)
    for n in range(8):
        asked = [i for i in range(36) if batch.asked[n, i]]
        best = max(asked, key=lambda i: float(batch.texture[n, i] @ known["direction"]))
        for i in range(36):
            wanted = batch.texture[n, i].clone()
            if batch.trigger[n, i]:
                wanted += batch.texture[n, i - 1] @ known["rotation"]
            if task.kind == "broadcast":
                wanted += batch.texture[n, best] @ known["rotation"]
            assert torch.allclose(batch.answer[n, i], wanted, atol=1e-5), (n, i)


@pytest.mark.parametrize("variant", VARIANTS)
def test_idle_patches_never_matter(variant):
    """Nothing is asked of them, they are no triggers, and no answer that is asked changes with what they hold."""
    config = configuration(variant=variant, batch_size=64)
    batch, task = recipe.draw(config, 0), recipe.task(config)
    assert not (batch.idle & batch.asked).any()
    assert not (batch.idle & batch.trigger).any()
    assert not (batch.idle[:, :-1] & batch.trigger[:, 1:]).any()
    assert not batch.trigger[:, ::6].any()  # the first of a row has no left neighbour
    counts = {"none": 0, "corner": 1}.get(task.idle, 4)
    assert (batch.idle.sum(1) == counts).all()
    if task.idle == "corners":
        assert batch.idle[0].nonzero().flatten().tolist() == [0, 5, 30, 35]
    if task.blank:
        assert (batch.texture[batch.idle] == 0).all()
    if task.kind == "copy":
        may = batch.asked & ~batch.idle.roll(1, 1) & (torch.arange(36) % 6 > 0)
        assert batch.trigger.float().sum() / may.sum() == pytest.approx(task.trigger_share, abs=0.05)


def test_pixels_hold_the_textures():
    batch = recipe.draw(configuration(), 5)
    assert torch.equal(patches(batch.pixels), batch.texture)  # no noise by default


def test_batches_hang_on_seed_and_step_alone():
    config = configuration()
    one, other = recipe.draw(config, 4), recipe.draw(config, 4)
    assert torch.equal(one.pixels, other.pixels)
    assert not torch.equal(one.pixels, recipe.draw(config, 5).pixels)
    assert not torch.equal(one.pixels, recipe.draw(replace(config, seed=1), 4).pixels)
    held = recipe.held_out(config, 8)
    assert not torch.equal(held.pixels, recipe.held_out(config, 8, part=1).pixels)


def test_the_parts_of_a_batch_make_its_loss():
    config = configuration()
    torch.manual_seed(0)
    module = recipe.build(config)
    whole = recipe.loss(module, config, 2, "cpu")[0].item()
    parts = []
    for part in range(2):
        with parallel.micro_batch(part, 2):
            parts.append(recipe.loss(module, config, 2, "cpu")[0].item())
    assert sum(parts) / 2 == pytest.approx(whole, rel=1e-5)


def test_the_loss_is_the_mean_over_what_is_asked():
    config = configuration()
    torch.manual_seed(0)
    module = recipe.build(config)
    batch = recipe.draw(config, 0)
    given = module(batch.pixels)
    total = sum(
        ((given[n, i] - batch.answer[n, i]) ** 2).mean() for n in range(8) for i in range(36) if i not in (0, 5, 30, 35)
    )
    assert recipe.loss(module, config, 0, "cpu")[0].item() == pytest.approx(total.item() / (8 * 32), rel=1e-5)


def test_an_unknown_variant_is_refused():
    with pytest.raises(UserError, match="unknown variant of emergence 'cornes': did you mean corners"):
        recipe.task(configuration(variant="cornes"))
    with pytest.raises(UserError, match="unknown cell of the sweep"):
        sweep.cell("nothing")


def test_attention_that_sinks_receive():
    """Half of the attention of four tokens goes to token 0, which gives all of its own to itself."""
    attention = torch.full((2, 1, 4, 4), 1 / 6)
    attention[..., 0] = 0.5
    attention[:, :, 0] = torch.tensor([1.0, 0, 0, 0])
    places = torch.zeros(2, 4, dtype=torch.bool)
    places[:, 0] = True
    assert sinks.received(attention, places).item() == pytest.approx(0.5)


def test_lengths_of_updates(tiny):
    """A head's share of W_o, with LayerScale, against single products; a drained value gives its ratio."""
    attn = tiny(init_values=0.5).blocks[0].attn
    torch.manual_seed(0)
    v = torch.randn(2, 3, 5, 16)
    v[:, :, 0] *= 0.1
    written = sinks.updates(v, attn, torch.full((48,), 0.5))
    for n, h, t in [(0, 0, 0), (1, 2, 4), (1, 1, 3)]:
        padded = torch.zeros(48)
        padded[16 * h : 16 * h + 16] = v[n, h, t]
        assert torch.allclose(written[n, h, t], 0.5 * (attn.proj.weight @ padded), atol=1e-6)


def test_drained_and_constant_updates():
    """A tenth as long: 0.1 by both ratios; long but the same in every image: no spread."""
    torch.manual_seed(0)
    places = torch.zeros(64, 5, dtype=torch.bool)
    places[:, 0] = True
    drained = torch.nn.functional.normalize(torch.randn(64, 3, 5, 6), dim=-1)
    drained[:, :, 0] *= 0.1
    assert sinks.length_ratio(drained, places).tolist() == pytest.approx([0.1] * 3, rel=1e-4)
    assert sinks.spread_ratio(drained, places).tolist() == pytest.approx([0.1] * 3, rel=0.1)
    drained[:, :, 0] = torch.tensor([0.0, 2, 0, 0, 0, 0])
    assert sinks.length_ratio(drained, places).tolist() == pytest.approx([2.0] * 3, rel=1e-4)
    assert (sinks.spread_ratio(drained, places) < 1e-4).all()


def test_a_sink_made_by_hand_is_measured():
    """Key 0 made attractive by its position alone, its value zero, its norm ten times that of others."""
    config = configuration()
    torch.manual_seed(0)
    model = recipe.build(config).eval()
    with torch.no_grad():
        model.pos_embed[:, [0, 5, 30, 35]] = 0.0
        model.pos_embed[:, [0, 5, 30, 35], 0] = 200.0
        for block in model.blocks:
            qkv = block.attn.qkv
            qkv.weight[:, 0] = 0.0  # the corners' one dimension enters no value …
            qkv.bias.zero_()
            qkv.bias[:24] = 1.0  # … but every query asks for it
            qkv.weight[24:48, 0] = 5.0
    batch = recipe.held_out(config, 16)
    found = sinks.measure(model, batch.pixels, batch.idle)
    assert (found.attention > 0.95).all()
    assert (found.value_ratio < 0.3).all()
    assert (found.place_norm > 10).all()
    assert found.outlier_share.tolist() == pytest.approx([4 / 36] * len(found))
    assert (found.prefix_attention == 0).all()
    assert sweep.verdict(found.assign(cell="first: corners", seed=0, step=1, value_ratio=0.1)).emerged.all()
    assert not sweep.verdict(found.assign(cell="first: corners", seed=0, step=1, value_ratio=0.5)).emerged.any()


def test_without_idle_places_there_is_a_verdict_too():
    config = configuration(variant="nothing-idle")
    model = recipe.build(config).eval()
    found = sinks.measure(model, recipe.held_out(config, 4).pixels)
    assert found[["place_norm", "attention", "value_ratio", "top_in_places"]].isna().to_numpy().all()
    assert not sweep.verdict(found.assign(cell="first: nothing idle", seed=0, step=1)).emerged.any()


def test_attention_of_a_register_is_measured():
    config = configuration(registers=1)
    torch.manual_seed(0)
    model = recipe.build(config).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()  # uniform attention over 37 tokens
            block.attn.qkv.bias.zero_()
    batch = recipe.held_out(config, 4)
    found = sinks.measure(model, batch.pixels, batch.idle)
    assert found.prefix_attention.tolist() == pytest.approx([1 / 37] * len(found))
    assert found.attention.tolist() == pytest.approx([4 / 37] * len(found))


def test_a_cell_trains_resumes_and_is_recorded(tmp_path, monkeypatch):
    options = dict(steps=30, eval_images=16, telemetry_images=8, warmup=2, save_every=10)
    monkeypatch.setattr(sweep, "TABLE", tmp_path / "sweeps" / "emergence.parquet")
    name, losses = sweep.names()[0], []
    rows = sweep.run(name, 0, tmp_path / "straight", on_step=lambda step, loss: losses.append(loss), **options)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert rows.step.max() == 30

    def stop(step, loss):
        if step == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.run(name, 0, tmp_path / "stopped", on_step=stop, **options)
    again = sweep.run(name, 0, tmp_path / "stopped", **options)
    pd.testing.assert_frame_equal(again, rows)
    sweep.record(rows)
    sweep.record(rows.assign(seed=1))
    sweep.record(again)  # in place of the first
    assert sweep.table().groupby(["cell", "seed"]).size().tolist() == [len(rows)] * 2


def test_the_table_knows_only_cells_of_the_sweep():
    if sweep.TABLE.exists():
        assert set(sweep.table().cell) <= set(sweep.names())
    for name in sweep.names():
        recipe.task(loop.configure("emergence", **sweep.cell(name))[0])


def test_the_criterion_asks_for_three_seeds_and_the_control():
    """Four of five seeds have all of it; registers leave none, or one."""
    names = ("outlier_share", "norm_ratio", "attention", "value_ratio", "prefix_attention")
    plain = pd.DataFrame([(0.11, 5.0, 0.8, 0.1, 0.0)] * 4 + [(0.11, 7.0, 0.8, 0.3, 0.0)], columns=names)
    control = pd.DataFrame([(0.0, float("nan"), 0.1, 1.0, 0.9)] * 5, columns=names)

    def judged(plain, control):
        table = pd.concat([plain.assign(cell="with"), control.assign(cell="without")])
        table = table.assign(seed=table.groupby("cell").cumcount(), emerged=table.value_ratio <= 0.2)
        found = sweep.claims(table.set_index(["cell", "seed"]), "with", "without")
        return {claim: holds for claim, holds, *_ in found}, found

    verdicts, found = judged(plain, control)
    assert verdicts == {
        "ours-emerged": True,
        "ours-sinks": True,
        "ours-norms": True,
        "ours-drained": False,
        "ours-registers": True,
    }
    assert "4 of 5 seeds" in found[0][2]
    assert judged(plain[2:], control)[0]["ours-emerged"] is False  # two of three
    assert judged(plain[:2], control)[0]["ours-norms"] is None  # too few
    control.loc[0, "outlier_share"] = 0.11
    verdicts, _ = judged(plain, control)
    assert (verdicts["ours-emerged"], verdicts["ours-registers"]) == (False, False)


def test_the_shipped_models_have_artifacts_and_have_none():
    """The four corners of every image from the middle block on, made by neurons there; none with trained registers."""
    model = zoo.load("mini-corners")
    some = images.load("textures", model, 64)
    norms = model.capture(some, "norms").patch_norms
    assert detection.detect(model, some).onset == 1
    above = norms[:, -1] > outliers.cutoff(norms[:, -1])
    corners = torch.zeros(36, dtype=torch.bool)
    corners[list(textures.CORNERS)] = True
    assert torch.equal(above, corners.expand(64, 36))
    found = mend.find(model, some)
    assert {block for block, _ in found.neurons} == {1}
    mended = mend.with_test_time_registers(model, 4, found.neurons)
    assert not (mended.capture(some, "norms").patch_norms[:, -1] > found.cutoff).any()
    other = zoo.load("mini-corners-reg4")
    assert detection.detect(other, images.load("textures", other, 64)).answer == "none"
