"""Place or content, paired verdicts, registers through a model, what moving neurons does: known answers."""

from __future__ import annotations

import fig06
import fig09
import fig10_fig11
import map_scores
import paired
import pytest
import test_time_registers
import torch
import where_artifacts_sit

from vitreg_lib.data import images as image_sets
from vitreg_lib.measure import places
from vitreg_lib.model import mend, mini
from vitreg_lib.model.model import Model
from workflow import plant


@pytest.fixture(scope="module")
def control():
    torch.manual_seed(0)
    module = mini.build("m", num_classes=24).eval().requires_grad_(False)
    base = Model("random-mini", module, "0" * 64, input_size=96, head={"colour": (8, 16)})
    return plant.plant(base)


@pytest.fixture(scope="module")
def pictures(control):
    return image_sets.load("scenes", control, 24)


def test_outliers_of_fixed_places_are_explained_by_position_alone():
    noise = torch.rand(40, 16, generator=torch.Generator().manual_seed(0))
    corners = torch.zeros(40, 4, 4, dtype=torch.bool)
    corners[:, ::3, ::3] = True
    table = where_artifacts_sit.explained(corners, {"noise": noise})
    assert table.auc["position"] > 0.99 and abs(table.auc["noise"] - 0.5) < 0.15, table


def test_outliers_of_quiet_patches_are_explained_by_content_alone():
    quiet = torch.rand(60, 16, generator=torch.Generator().manual_seed(0))
    table = where_artifacts_sit.explained((quiet > 0.8).view(60, 4, 4), {"quiet": quiet})
    assert table.auc["quiet"] > 0.99 and abs(table.auc["position"] - 0.5) < 0.15, table
    assert table.deviance_explained["all"] > 0.5


def test_nothing_to_explain_is_said():
    with pytest.raises(ValueError, match="no outliers"):
        where_artifacts_sit.explained(torch.zeros(8, 3, 3, dtype=torch.bool), {"x": torch.rand(8, 9)})


def test_planted_artifacts_follow_their_place_where_contents_are_exchanged(control, pictures):
    cutoff = 0.5 * control.capture(pictures, layers=-1).patch_norms.max().item()
    table = places.tests(control, pictures.x, cutoff)
    swapped = table.loc["contents exchanged"]
    assert swapped.follows_content == 0, "the inner places were never allowed"
    assert (
        table.loc["position embeddings exchanged"].follows_place
        > table.loc["position embeddings exchanged"].follows_content
    )
    assert table.outliers["a grey image"] >= 1, "every allowed place is quiet in a grey image"


def test_exchanging_contents_twice_gives_the_image_back():
    x = torch.rand(2, 3, 24, 32)
    a, b = torch.tensor([0, 5]), torch.tensor([7, 10])
    once = places.swap_contents(x, a, b, (3, 4))
    assert not torch.equal(once, x) and torch.equal(places.swap_contents(once, a, b, (3, 4)), x)


def test_sign_test_leaves_equal_pairs_out_and_tells_which_is_lower():
    without = torch.tensor([3.0, 3.0, 3.0, 3.0, 3.0, 3.0])
    share, p = paired.sign_test(without, torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 3.0]))
    assert share == 1 and abs(p - 0.5**5) < 1e-12
    assert paired.sign_test(without, without)[1] == 1


def test_judging_names_pairs_by_kind():
    scores = {"m": torch.arange(20.0), "m with four": torch.arange(20.0) - 1, "m mended": torch.arange(20.0) + 1}
    origins = {"m": "none", "m with four": "trained", "m mended": "test time", "not scored": "trained"}
    bases = {name: "" if name == "m" else "m" for name in origins}
    models = [Model(n, None, "", label=n, base=bases[n], registers_from=origin) for n, origin in origins.items()]
    table = paired.compare(scores, models)
    assert list(table.index) == ["m with four", "m mended"] and set(table.without) == {"m"}
    assert paired.judge(table, "trained")[0] is True and paired.judge(table, "test time")[0] is False
    assert paired.judge(paired.compare({"m": scores["m"]}, models), "trained")[0] is None


def test_a_pair_is_judged_where_the_model_without_registers_has_artifacts():
    noise = torch.tensor([1.0, -1.0]).repeat(10)
    models = [Model(name, None, "", label=name) for name in ("m", "n")]
    models += [Model(f"{b} with", None, "", label=f"{b} with", base=b, registers_from="trained") for b in ("m", "n")]
    scores = {"m": torch.zeros(20), "m with": noise, "n": torch.zeros(20), "n with": noise - 2}
    table = paired.compare(scores, models)
    assert paired.judge(table, having=["m"])[0] == "undecided"
    assert paired.judge(table, having=["n"])[0] is True
    assert paired.judge(table, having=["m", "n"])[0] == "undecided"
    verdict, measured = paired.judge(table, having=[])
    assert verdict is None and measured.startswith("without registers no model of a pair has artifacts")


def test_registers_enter_matter_and_leave():
    torch.manual_seed(0)
    model = Model("four", mini.build("xs", registers=4).eval(), "0" * 64, input_size=96)
    torch.nn.init.normal_(model.module.reg_token, std=0.5)
    x = torch.randn(3, 3, 96, 96)
    assert fig06.flow(model, x) == {
        "patches": 144,
        "registers": 4,
        "tokens_in": 149,
        "tokens_returned": 145,
        "parameters_of_registers": 4 * 16,
    }
    assert fig06.effect(model, x, "image") == 0
    assert fig06.effect(model, x, "permute") < 1e-5 < fig06.effect(model, x, "noise")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.module.modules())


def test_experiment_is_paired_and_keeps_the_planted_control_right(control, pictures):
    found = mend.find(control, pictures)
    table, before = test_time_registers.experiment(
        control, pictures, found, counts=(0, 1), labels=pictures.scenes.label
    )
    one = table.set_index(["kind", "registers"])
    assert before["outlier_share"] > 0.01 > one.outlier_share["found"][1]
    assert one.outlier_share["random"][1] > 0.5 * before["outlier_share"]
    assert one.attention_on_outliers["found"][1] < before["attention_on_outliers"]
    assert set(table.kind) == {"found", "found + 2 next", "random"} and {"newly_wrong", "corloc"} <= set(table)


def test_registers_on_different_objects_are_told_from_registers_alike(pictures):
    inside = torch.stack([(pictures.scenes.instances == k + 1).float() for k in range(2)], 1)
    maps = torch.nn.functional.adaptive_avg_pool2d(inside, (12, 12)) + 1e-3
    apart = fig09.object_spread(fig09.mass_on(maps, inside.bool()))
    assert apart.spread > 2 * apart.shuffled and apart.p < 0.05 and apart.low > fig09.LEAST_SPREAD
    same = fig09.object_spread(fig09.mass_on(maps[:, :1].expand(-1, 2, -1, -1), inside.bool()))
    assert same.spread < 1e-6 and abs(same.low) < 1e-6 and abs(same.high) < 1e-6


def test_background_patches_touch_no_object(pictures):
    free = map_scores.background(pictures, (12, 12))
    big = free.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert (pictures.scenes.instances[big] == 0).all() and 0 < free.float().mean() < 1


def test_resizing_a_model_leaves_the_given_one(control):
    before = control.module.pos_embed.clone()
    plain = fig10_fig11.at_size(control, 80, antialias=False, offset=0.1)
    smooth = fig10_fig11.at_size(control, 80)
    assert torch.equal(control.module.pos_embed, before) and plain.input_size == 80
    assert plain.module.pos_embed.shape[1] == 100 and not torch.equal(plain.module.pos_embed, smooth.module.pos_embed)
    assert plain.capture(torch.randn(1, 3, 80, 80)).grid == (10, 10)
