"""The artificial task on scenes, and the table of what came of it."""

import sys

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from vitreg_lib.base import ROOT, UserError

sys.path.insert(0, str(ROOT / "workflow"))
import sinks  # noqa: E402
import stamped  # noqa: E402

from vitreg_lib.data import images, scenes  # noqa: E402
from vitreg_lib.measure import detection  # noqa: E402
from vitreg_lib.model import zoo  # noqa: E402
from vitreg_lib.train import loop  # noqa: E402


def test_answers_are_own_colours_and_where_marked_the_left_neighbours():
    config = loop.configure(stamped.__file__)[0]
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
            wanted = wanted + colours(n, row, col - 1) @ stamped.emergence.fixed(0)["rotation"]
        torch.testing.assert_close(batch.answer[n, patch], wanted, rtol=0, atol=1e-5)


def test_a_seed_of_a_cell_joins_the_table(tmp_path, monkeypatch):
    recorded = pd.read_parquet(stamped.TABLE)
    recorded.to_parquet(tmp_path / "stamped.parquet")
    monkeypatch.setattr(stamped, "TABLE", tmp_path / "stamped.parquet")
    monkeypatch.setattr(stamped, "ROOT", tmp_path)
    short = {"steps": 2, "warmup": 1, "eval_images": 8, "telemetry_images": 4}
    monkeypatch.setattr(stamped, "CELLS", {name: options | short for name, options in stamped.CELLS.items()})
    for cell in ("stamped-reg4", "strong"):
        stamped.main(cell, 0)  # takes the place of the recorded one
        stamped.main(cell, 9)
    now = pd.read_parquet(stamped.TABLE)
    assert list(now.columns) == list(recorded.columns)
    assert len(now) == len(recorded) + 2 * 3
    new = now[now.steps == 2]
    assert new.groupby(["cell", "seed"]).layer.apply(list).tolist() == [[0, 1, 2]] * 4
    assert (new.registers == new.cell.map({"stamped-reg4": 4, "strong": 0})).all()
    assert new[new.registers == 4].registers_cosine.max() < 0.9
    assert new[new.registers == 0][["register_start", "registers_cosine"]].isna().all(axis=None)


def test_which_seeds_count_by_what_was_set_before_the_runs():
    """The criteria of docs/log.md: a pair asks for three seeds that do without registers, and the same three with."""
    table = pd.read_parquet(stamped.TABLE)
    ended = table[table.steps == table.of]
    assert (ended.explained_marked > 0.9).all() and (ended.explained_others > 0.9).all()
    last = ended[ended.layer == 2].set_index(["cell", "seed"])
    grew = (last.outlier_share >= 0.01) & (last.attention_mean >= 0.2)
    assert grew["stamped"][grew["stamped"]].index.tolist() == [0, 2, 4] and len(grew["stamped"]) == 6
    assert not grew.drop("stamped").any()
    with_registers = ended[ended.registers == 4]
    assert (with_registers.outlier_share == 0).all()
    cured = last.prefix_attention[last.registers == 4] >= 0.2
    assert cured["stamped-reg4"][[0, 2, 4]].all() and len(cured["stamped-reg4"]) == 6
    assert not cured["stamped-reg4-start1"].any()
    assert (table[table.steps < table.of].explained_marked < 0.6).all()  # stopped before copying was learnt


def test_the_shipped_pair_grew_artifacts_without_registers_and_none_with():
    """The criteria of docs/log.md, on images that `images.load` gives: neither trained on nor judged before."""
    for name, registers in (("mini-stamps", 0), ("mini-stamps-reg4", 4)):
        model = zoo.load(name, "cpu")
        shown = images.load("stamps", model, 64)
        assert shown.scenes is not None and shown.x.min() < -1 and 0 <= shown.pixels.min() <= shown.pixels.max() <= 1
        rows = sinks.measure(model.module, shown.x, stamped.idle().expand(64, -1))
        answer = detection.detect(model, shown).answer
        if registers:
            assert answer == "none" and rows.outlier_share.eq(0).all() and rows.prefix_attention.iloc[-1] > 0.2
            unit = F.normalize(model.module.reg_token[0].detach(), dim=1)
            assert (unit @ unit.T).fill_diagonal_(-1).max() < 0.9
        else:
            last = rows.iloc[-1]
            assert answer == "artifacts" and last.outlier_share >= 0.01 and last.attention_mean >= 0.2
    with pytest.raises(UserError, match="stamps have 64 pixels a side, this model wants 96; try mini-stamps"):
        images.load("stamps", zoo.load("mini-random", "cpu"), 2)
