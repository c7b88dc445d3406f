"""The three tasks of a frozen model: parts add up to the scores of torchmetrics and scikit-learn; judging by hand."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import fig08
import pytest
import tab02
import tab02_heads
import tab02_sets
import torch

from vitreg_lib.base import UserError
from vitreg_lib.model import zoo


def torchmetrics_iou(guess, masks, num_classes) -> float:
    from torchmetrics.functional.classification import multiclass_jaccard_index

    known = masks != 255
    return multiclass_jaccard_index(guess[known], masks[known], num_classes, average="macro").item()


def test_mean_iou_of_the_parts_is_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    guess, masks = (torch.randint(0, 4, (6, 9, 11), generator=generator) for _ in range(2))  # class 4 is never there
    masks[0, :3] = 255
    parts = tab02.iou_parts(guess, masks, 5)
    wanted = torchmetrics_iou(guess, masks, 5)
    assert tab02.SCORE["miou"](parts[None])[0].item() == pytest.approx(wanted, abs=1e-6)


def test_parts_of_one_image_are_those_of_a_loop():
    guess, masks = torch.tensor([[[0, 1, 1, 2]]]), torch.tensor([[[0, 1, 2, 255]]])
    assert tab02.iou_parts(guess, masks, 3).tolist() == [[1, 1, 0, 1, 2, 1]]


@pytest.fixture(scope="module")
def model():
    return zoo.load("mini-deit3-xs", "cpu")


@pytest.fixture(scope="module")
def small():
    return dict(n_train=24, n_test=16, seeds=(0, 1), steps=20)


def test_scores_are_those_of_the_probes_called_one_by_one(model, small):
    from sklearn.metrics import root_mean_squared_error

    found = tab02.scores(model, **small)
    assert {task: tuple(v.shape) for task, v in found.values().items()} == dict.fromkeys(tab02.TASKS, (2,))
    parts = {}
    for split, n in (("train", 24), ("test", 16)):
        pictures = tab02_sets.segmentation("scenes", split, model, n, 0)[0]
        seen = model.capture(pictures, "final", layers=-1)
        parts[split] = pictures.scenes, seen.patches(seen.final), seen.final[:, 0]
    rows = torch.randperm(24, generator=torch.Generator().manual_seed(1))[:19]
    train, test = parts["train"], parts["test"]
    head = tab02_heads.fit_segmentation(
        train[1][rows], (12, 12), train[0].semantic[rows, 2::4, 2::4], 9, steps=20, lr=1e-2, seed=1
    )
    guess = tab02_heads.predict_segmentation(head, test[1], (12, 12), (96, 96))
    wanted = torchmetrics_iou(guess, test[0].semantic, 9)
    assert found.values()["miou"][1].item() == pytest.approx(wanted, abs=1e-6)
    x, x_test = (tab02_heads.with_cls(p[1], p[2]) for p in (train, test))
    head = tab02_heads.fit_depth(
        x[rows], (12, 12), train[0].depth[rows, 2::4, 2::4], bins=16, steps=20, lr=1e-2, seed=1, upsample=2
    )
    guess = tab02_heads.predict_depth(head, x_test, (12, 12), (96, 96), upsample=2)
    by_image = [root_mean_squared_error(t.flatten(), g.flatten()) for t, g in zip(test[0].depth, guess, strict=True)]
    assert found.values()["rmse"][1].item() == pytest.approx(sum(by_image) / 16, rel=1e-5)


def test_the_same_model_changes_nothing_and_a_worse_one_is_seen(model, small):
    found = {"a": tab02.scores(model, depths="", **small)}
    found["a-reg4"] = found["a"]
    wrong = {k: v.clone() for k, v in found["a"].parts.items()}
    wrong["accuracy"] *= 0
    found["a+ttr1"] = dataclasses.replace(found["a"], parts=wrong)
    change = tab02.changes(found, {"a-reg4": "a", "a+ttr1": "a"}, draws=50)
    assert (change.loc["a-reg4", ["change", "low", "high"]].to_numpy() == 0).all()
    assert change.change["a+ttr1", "accuracy"] == pytest.approx(-found["a"].values()["accuracy"].mean().item())
    assert tab02.judge(change.loc["a-reg4", "accuracy"], "accuracy", 0.2)[0] is True
    alone = tab02.changes(found, {"a+ttr1": "a"}, draws=50)  # an interval hangs neither on the order nor on others
    assert alone.loc["a+ttr1"].equals(change.loc["a+ttr1"]) and change.loc["a-reg4"].index.tolist() == [
        "accuracy",
        "miou",
    ]
    table = tab02.table(found)
    assert table.accuracy["a+ttr1"] == 0 and "rmse" not in table and table.miou_sd["a"] >= 0


def test_verdicts_by_hand():
    row = {"change": -0.02, "low": -0.03, "high": -0.01}
    assert tab02.judge(row, "accuracy", 0.2)[0] is False
    assert tab02.judge(row, "rmse", 0.002) == (True, "-0.020 (-0.030 to -0.010)")
    assert tab02.judge({"change": 0.0, "low": -0.03, "high": 0.03}, "miou", 0.2)[0] == "undecided"


@pytest.mark.slow
def test_trained_features_beat_fresh_ones(small):
    options = small | {"n_train": 96, "n_test": 64, "steps": 100}
    trained, fresh = (tab02.scores(zoo.load(n, "cpu"), **options).values() for n in ("mini-deit3", "mini-random"))
    assert trained["miou"].min() > fresh["miou"].max() and trained["rmse"].max() < fresh["rmse"].min()


def test_no_task_and_unknown_data_are_refused(model):
    with pytest.raises(UserError, match="no task is left"):
        tab02.scores(model, "", "", "")
    with pytest.raises(UserError, match="at least two are needed, so raise n_train"):
        tab02.scores(model, dense="", depths="", n_train=2, n_test=2, seeds=(0,))
    with pytest.raises(UserError, match="classification set"):
        tab02.scores(model, "scnes", "", "")


def test_images_that_take_no_part_in_a_task_are_left_out(model):
    """Of lone objects nobody can say on which side of the next one they are: their label is -1."""
    found = tab02.scores(model, "scenes:relation", "", "", n_train=40, n_test=30, seeds=(0,))
    assert 0 < found.parts["accuracy"].shape[1] < 30


def test_ladders_need_three_numbers_and_go_from_none_to_most():
    def like(label, base="", registers=0, origin="none"):
        return SimpleNamespace(label=label, base=base, registers=registers, registers_from=origin)

    models = [like("a"), like("a16", "a", 16, "trained"), like("a2", "a", 2, "trained"), like("b")]
    models += [like(f"a+{n}", "a", n, "test time") for n in (1, 4)] + [like("b4", "b", 4, "trained")]
    models += [like(f"c+{n}", "c", n, "test time") for n in (1, 2)]
    found = {name: [m.label for m in members] for name, members in fig08.ladders(models).items()}
    assert found == {"a-reg": ["a", "a2", "a16"], "a+ttr": ["a", "a+1", "a+4"]}


def ladder(gains, images: int = 150, seed: int = 0):
    """(members, {label: Scores}) of models with 0, 1, 4 and 16 registers: noise, and a gain of each in every task."""
    generator = torch.Generator().manual_seed(seed)
    members = [SimpleNamespace(label=f"m{count}", registers=count) for count in (0, 1, 4, 16)]
    found = {}
    for member, gain in zip(members, gains, strict=True):
        union = torch.full((2, images, 3), 100.0).double()
        inter = (50 + 100 * gain + 15 * torch.randn(2, images, 3, generator=generator)).clamp(0, 100).double()
        right = (torch.rand(2, images, 1, generator=generator) < 0.5 + gain).double()
        rmse = (1 - gain + 0.2 * torch.randn(2, images, 1, generator=generator)).double()
        parts = {"accuracy": right, "miou": torch.cat([inter, union], -1), "rmse": rmse}
        found[member.label] = tab02.Scores(parts, dict.fromkeys(parts, "made up"))
    return members, found


def judged(gains, draws=100, without="", **options):
    members, found = ladder(gains, **options)
    for scores in found.values():
        scores.parts.pop(without, None)
    return {claim: holds for claim, (holds, _) in fig08.by_registers(found, members, draws).items()}


def test_the_number_of_registers_is_judged_where_the_truth_is_known():
    assert judged((0, 0.2, 0.25, 0.3)) == {"C030": True, "C031": True, "C032": True}
    late = judged((0, 0.02, 0.05, 0.3))
    assert late["C030"] is False and late["C031"] is True
    assert judged((0.3, 0.2, 0.1, 0)) == {"C030": None, "C031": False, "C032": False}
    half = judged((0, 0.2, 0.25, 0.3), without="rmse")  # masks alone cannot confirm what is claimed of masks and depth
    assert half == {"C030": None, "C031": None, "C032": True}


def test_chance_passes_the_rules_about_the_number_of_registers_in_few_cases():
    """Of four equal models another than the first is the best in three of four cases: that must not hold."""
    answers = [judged((0, 0, 0, 0), draws=60, images=60, seed=seed) for seed in range(40)]
    passed = {claim: sum(a[claim] is True for a in answers) for claim in ("C030", "C031", "C032")}
    assert passed["C030"] <= passed["C031"] <= 4 and passed["C032"] <= 6, passed
    assert sum(a["C031"] == "undecided" for a in answers) > 20


def test_the_papers_table_is_read_by_family():
    assert tab02.reported(False)["dinov2", "miou"] == pytest.approx(0.466)
    assert tab02.reported(True)["clip", "rmse"] == 0.661
    assert tab02.CLAIMS["dinov2", "rmse"] == "C093" and tab02.CLAIMS["deit3", "accuracy"] == "C085"


def test_figures_of_scores_are_drawn(model, small):
    import pandas as pd

    table = pd.DataFrame({"accuracy": [0.5, 0.6], "miou": [0.1, 0.3]}, index=["a", "a-reg4"])
    table = table.assign(accuracy_sd=0.1, miou_sd=0.1)
    index = pd.MultiIndex.from_tuples([("a-reg4", t) for t in ("accuracy", "miou")], names=["model", "task"])
    change = pd.DataFrame({"change": 0.1, "low": -0.1, "high": 0.2}, index=index)
    assert len(tab02.task_scores(table, change, {("a-reg4", "miou"): 0.013}).axes) == 4
    assert len(tab02.task_scores(table, change.iloc[:0]).axes) == 2
    ladder = table.assign(registers=[0, 4])
    assert len(fig08.scores_by_registers({"a-reg": ladder, "b+ttr": ladder.assign(registers=[1, 4])}).axes) == 2
