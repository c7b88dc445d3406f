"""The rule by which figures judge claims, on cases whose answer is known by hand."""

from __future__ import annotations

from types import SimpleNamespace

import fig02
import fig16
import fig17
import fig18
import pandas as pd
import pytest
import tab03
import torch
import verdicts

from vitreg_lib.measure import pairs


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.2, True), (-0.2, -0.1, False), (-0.1, 0.1, "undecided"), (0.0, 1.0, "undecided")],
)
def test_an_interval_decides_on_its_own_side_of_the_limit(low, high, verdict):
    assert verdicts.above(low, high) == verdict
    assert verdicts.above(low + 5, high + 5, 5) == verdict


def test_a_majority_is_decided_by_an_exact_interval():
    hits = torch.arange(100) < 70
    assert verdicts.majority(hits) is True and verdicts.majority(~hits) is False
    assert verdicts.majority(hits[60:80]) == "undecided"  # 10 of 20


@pytest.mark.parametrize("count", [1, 7, 200, 700, 3001])
def test_the_bootstrap_draws_in_parts_what_it_draws_at_once(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(1)).double()
    drawn = torch.randint(count, (2000, count), generator=torch.Generator().manual_seed(3))
    ends = torch.quantile(values[drawn].mean(1), torch.tensor([0.025, 0.975]).double()).tolist()
    sizes, draw = [], torch.randint

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            made = function(*args, **kwargs or {})
            sizes.append(made.numel() if function is draw else 0)
            return made

    with Watched():
        assert pairs.interval(values, seed=3) == tuple(ends)
    assert 0 < max(sizes) <= 2**20  # however many images there are


def test_a_share_of_outliers_is_judged_by_its_interval_over_images():
    mask = torch.zeros(10, 14, 14, dtype=torch.bool)
    none = verdicts.over_images(mask)
    assert (none.value, none.low) == (0, 0) and none.below() == "undecided"  # 1,960 tokens: up to 3 of them
    assert none.high == pytest.approx(3 / 1960)
    mask[0, 0, :4] = True  # four outliers, all in one image: twice the limit, but not in the others
    one = verdicts.over_images(mask)
    assert str(one) == f"0.20% (0.00 to {100 * one.high:.2f})" and one.high > none.high and one.below() == "undecided"
    assert verdicts.over_images(mask.new_zeros(100, 196)).below() is True
    assert verdicts.over_images(mask.new_ones(10, 4)).below() is False
    half = verdicts.over_images(torch.arange(100)[:, None] % 2 == 0)  # as the normal approximation has it
    assert half.value == 0.5 and half.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.01)


def some(label, family="", role="trained", registers=0, base="", reg_token=None):
    anatomy = SimpleNamespace(num_registers=registers)
    module = SimpleNamespace(reg_token=reg_token)
    facts = dict(label=label, family=family, role=role, base=base, replayed=False)
    return SimpleNamespace(**facts, anatomy=anatomy, module=module)


def test_a_claim_needs_a_trained_model_with_artifacts():
    models = [some("a", "deit3"), some("b", "augreg"), some("planted", role="planted control"), some("c", "clip")]
    assert verdicts.specimen(models, {"planted", "b"}).label == "b"
    assert verdicts.specimen(models, {"planted"}) is None
    assert [m.label for m in verdicts.of_family(models, "deit3")] == ["a", "b"]


def test_a_masked_autoencoder_is_judged_beside_a_model_with_artifacts_on_the_same_images():
    mae, other = some("mini-mae"), some("a")
    above = {"mini-mae": torch.zeros(100, 196, dtype=torch.bool), "a": torch.ones(100, 196, dtype=torch.bool)}

    def judged(groups, above=above):
        return {claim: holds for claim, holds, *_ in fig17.claims(groups, above, {"a"}, {})}["C058"]

    assert judged([[mae], [other]]) is None
    assert judged([[mae, other]]) is True and judged([[mae, other]], above | {"mini-mae": above["a"]}) is False


def test_absence_counts_against_the_paper_on_its_own_models_only():
    assert verdicts.exists(True, "mini") is True
    assert verdicts.exists(False, "mini") is None and verdicts.exists(False, "large") is False


def test_registers_are_judged_where_the_model_without_has_artifacts():
    plain, paired = some("a"), some("a-reg4", registers=4, base="a")
    assert verdicts.registered([plain, paired], {"a-reg4": "a"}, {"a"}, "mini")[0] == [paired]
    chosen, reason = verdicts.registered([plain, paired], {"a-reg4": "a"}, set(), "mini")
    assert chosen == [] and "a-reg4" in reason
    assert verdicts.registered([paired], {}, set(), "large")[0] == [paired]


def pair(label, base, origin="fine-tuned", family=""):
    facts = dict(label=label, name=label, entry=label, base=base, registers=4, registers_from=origin)
    return SimpleNamespace(**facts, role="trained", family=family, replayed=False)


def test_a_family_is_judged_on_pairs_trained_alike_whose_model_without_has_artifacts():
    models = [pair("a", "", "none", "deit"), pair("a-reg4", "a"), pair("c", "", "none", "clip"), pair("c-reg4", "c")]
    models += [pair("a+ttr4", "a", "test time", "deit"), pair("d", "", "none", "deit3"), pair("d-reg4", "d", "trained")]
    assert verdicts.cured(models, {"a", "c"}, "deit3") == (
        {"a-reg4": "a"},
        "no artifacts without registers: a-reg4, d-reg4",
    )
    assert verdicts.cured(models, {"c"}, "deit3")[0] == {} and verdicts.cured(models, {"a", "c"}, "clip")[0] == {
        "c-reg4": "c"
    }
    assert set(verdicts.cured(models, {"a", "c", "d"})[0]) == {"a-reg4", "c-reg4", "d-reg4"}
    assert "no pair trained as DINOv2" in verdicts.cured(models, {"a"}, "dinov2")[1]


def test_object_discovery_is_judged_on_the_papers_set_with_its_features_and_margin():
    models = [pair("a", "", "none", "deit"), pair("a-reg4", "a")]
    few, many = torch.arange(50) < 5, torch.arange(50) < 25
    hits = {n: {(f, 0.0): v for f in ("keys", "values")} for n, v in (("a", few), ("a-reg4", many))}
    box = SimpleNamespace(hits=few)

    def judged(having, images, after=many):
        scored = hits | {"a-reg4": dict.fromkeys(hits["a"], after)}
        answers = {name: "artifacts" if name in having else "undecided" for name in scored}
        every = tab03.claims(models, scored, {"box": box}, answers, dict.fromkeys(scored, (images, "50 photos")))
        return {claim: (holds, text) for claim, holds, text, *_ in every}

    here = judged({"a"}, "coco")
    assert here["C097"] == (True, "values, bias 0, 50 photos: a-reg4 +40.0 points (+26.0 to +54.0)")
    assert here["C095"][0] is None and here["C104"][0] is None  # one pair cannot show what is claimed of all
    assert judged({"a"}, "coco", few)["C097"][0] is False and judged({"a"}, "coco", few)["C104"][0] == "undecided"
    assert judged(set(), "coco")["C097"][0] is None and judged({"a"}, "scenes")["C097"][0] is None
    ours = judged(set(), "coco")["ours-a-reg4-values"]
    assert ours[0] is None and ours[1].startswith("the detector is undecided whether a has artifacts on these images")


def test_each_column_of_object_discovery_has_the_baselines_of_its_own_images():
    index = pd.MultiIndex.from_product([["a", "b"], ["keys, bias 0"]])
    table = pd.DataFrame({"value": [10.0, 20.0], "low": [5.0, 15.0], "high": [15.0, 25.0]}, index=index)
    lines = {"a": {"whole image": 36.0, "centred": 42.0}, "b": {"whole image": 0.0, "centred": 12.0}}
    (axis,) = tab03.draw(table, lines).axes
    drawn = {tuple(part.get_segments()[0].flatten().round(2)) for part in axis.collections}
    assert {(-0.45, 36, 0.45, 36), (-0.45, 42, 0.45, 42), (0.55, 0, 1.45, 0), (0.55, 12, 1.45, 12)} <= drawn


def test_copies_are_recognised():
    one = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1))
    assert verdicts.copies(some("m", reg_token=one.expand(1, 4, 16) + 1e-6 * noise))
    assert not verdicts.copies(some("m", reg_token=noise))
    assert not verdicts.copies(some("m", reg_token=one)) and not verdicts.copies(some("m"))
    assert verdicts.copies(SimpleNamespace(replayed=True, measured={"copies": True}))


def test_the_peak_of_the_background_is_looked_up_among_the_outliers():
    attention = torch.tensor([[[9.0, 5.0], [1.0, 0.0]], [[9.0, 1.0], [5.0, 0.0]]])
    is_outlier = torch.tensor([[[False, True], [False, False]]]).expand(2, 2, 2)
    background = torch.tensor([[[False, True], [True, True]]]).expand(2, 2, 2)
    assert fig02.peak_is_outlier(attention, is_outlier, None).tolist() == [False, False]
    assert fig02.peak_is_outlier(attention, is_outlier, background).tolist() == [True, False]


def test_a_leaning_is_chosen_on_one_half_of_the_images_and_measured_on_the_other():
    score = torch.zeros(200, 3)
    score[:, 1] += 0.2
    score[::2, 2] += 0.5  # on the even images alone, as chance would have it
    which, gap, low, high = fig16.leaning(score, torch.zeros(200, 3))
    assert which == 2 and gap == 0 and low == high == 0
    assert fig16.leaning(score[:, :2], torch.zeros(200, 2))[:2] == (1, pytest.approx(0.2))


def test_a_local_map_has_less_entropy_than_wide_ones():
    wide = torch.ones(50, 2, 4, 4) + 0.1 * torch.rand(50, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    local = torch.full((50, 1, 4, 4), 1e-3)
    local[:, :, 1, 1] = 1.0
    gap, low, high = fig16.entropy_gap(torch.cat([wide, local], 1), local=2)
    assert 0 < low <= gap <= high


def test_two_equal_heads_do_not_differ():
    lift = 2 + torch.randn(200, 1, generator=torch.Generator().manual_seed(0)).expand(200, 2)
    assert fig18.gap_between_heads(lift) == (0, 0)
    low, _ = fig18.gap_between_heads(lift * torch.tensor([1.0, 2.0]))
    assert low > 0
