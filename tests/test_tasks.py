"""Tasks on scenes, digits and photos, and classification from a single token on models whose tokens are known."""

from __future__ import annotations

import dataclasses

import clip
import pandas as pd
import pytest
import tables
import tables_sgd
import tables_tasks
import torch

from vitreg_lib.base import UserError
from vitreg_lib.data import scenes, sets
from vitreg_lib.model import mini, zoo
from vitreg_lib.model.model import Model
from vitreg_lib.probes import linear


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITREG_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def problem():
    return tables_tasks.load("scenes", 60, 40)[0]


def test_scenes_carry_many_tasks_and_none_is_named_after_a_real_set(problem):
    real = {e["title"].split()[0].lower() for e in sets.entries().values()} | set(sets.entries())
    assert len(problem.tasks) >= 8 and not {t.name for t in problem.tasks} & real
    assert {t.metric for t in problem.tasks} == {"accuracy", "mean average precision"}
    for task in problem.tasks:
        for y, n in ((task.train, 60), (task.test, 40)):
            assert len(y) == n and y.max() < (2 if y.ndim == 2 else task.classes) and y.min() >= tables_tasks.LEFT_OUT
            assert y.ndim == 1 or y.shape[1] == task.classes
    assert not set(problem.train.rows["index"]) & set(problem.test.rows["index"])


def test_labels_are_what_the_scene_shows(problem):
    truth = scenes.render(torch.tensor(problem.train.rows["index"][:]), 96)
    found = {t.name: t.train for t in problem.tasks}
    assert torch.equal(found["shape"], truth.label) and torch.equal(found["background"], truth.background)
    assert torch.equal(found["kind"] // 4, found["shape"]) and torch.equal(found["kind"] % 4, found["texture"])
    for i, words in enumerate(clip.captions_of(truth)):
        side = {0: "left of", 1: "right of", 2: "above", 3: "below"}.get(found["relation"][i].item())
        assert (side in words) if side else " a " not in words[2:].split(" on a ")[0], words
        present = {scenes.SHAPES[k] for k in found["shapes"][i].nonzero()[:, 0]}
        assert scenes.SHAPES[found["shape"][i]] in present
        assert found["count"][i] + 1 == truth.visible[i].sum()
    some = found["round"] >= 0
    assert {scenes.SHAPES[k] for k in found["shape"][some]} <= {"disc", "ring", "moon"} and not some.all()


def test_another_seed_draws_other_images():
    a, b = (tables_tasks.load("scenes", 20, 20, seed)[0] for seed in (0, 1))
    rows = [set(p.rows["index"]) for q in (a, b) for p in (q.train, q.test)]
    assert len(set.union(*rows)) == 80 and a.train.digest != b.train.digest


def test_digits_are_split_and_enlarged():
    problem = tables_tasks.load("digits", 100, 50)[0]
    model = Model("m", None, "0", input_size=96)
    x = problem.train.pixels(problem.train.rows[:3], model)
    assert (
        x.shape == (3, 3, 96, 96)
        and 0 <= x.min()
        and x.max() <= 1
        and (len(problem.train), len(problem.test)) == (100, 50)
    )
    assert problem.tasks[0].classes == 10 and "8 x 8" in problem.title


def test_some_tasks_can_be_asked_for():
    assert [t.name for t in tables_tasks.load("scenes:kind,colour", 20, 20)[0].tasks] == ["kind", "colour"]
    with pytest.raises(UserError, match="unknown task of scenes 'kinds': did you mean kind"):
        tables_tasks.load("scenes:kinds", 20, 20)
    with pytest.raises(UserError, match="unknown classification set 'fod': did you mean food"):
        tables_tasks.load("fod")


def test_what_is_not_here_is_told_and_the_rest_goes_on(no_models):
    found, missing = tables_tasks.reachable("digits dtd", 50, 50)
    assert [p.name for p in found] == ["digits"] and "Describable Textures" in missing["dtd"]
    with pytest.raises(UserError, match="dtd"):
        tables_tasks.reachable("dtd")


def test_photos_come_through_the_models_own_preprocessing(real):
    problem = tables_tasks.load("caltech101-small", 30, 20)[0]
    model = Model("m", None, "0", input_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert problem.train.pixels(problem.train.rows[:2], model).shape == (2, 3, 64, 64)
    assert "30 taken" in problem.title and problem.tasks[0].metric == "accuracy"
    again = tables_tasks.load("caltech101-small", 30, 20)[0]
    other = tables_tasks.load("caltech101-small", 30, 20, seed=1)[0]
    assert again.train.digest == problem.train.digest != other.train.digest


def task(train, test, classes, metric="accuracy"):
    return tables_tasks.Task("t", "", metric, torch.tensor(train), torch.tensor(test), classes)


def test_small_classes_are_left_out_and_too_few_are_named():
    here = [torch.ones(12, dtype=torch.bool), torch.ones(4, dtype=torch.bool)]
    keep, y, count = tables.usable(task([0] * 5 + [2] * 5 + [1, -1], [0, 1, 2, -1], 3), here)
    assert count == 2 and keep[0].tolist() == list(range(10)) and keep[1].tolist() == [0, 2]
    assert y[0].tolist() == [0] * 5 + [1] * 5 and y[1].tolist() == [0, 1]
    with pytest.raises(UserError, match="task t: 1 of 3 classes have 4 training images among the 12"):
        tables.usable(task([0] * 10 + [1, 1], [0, 1, 2, 0], 3), here)
    with pytest.raises(UserError, match="no test image of the 2 classes is left"):
        tables.usable(task([0] * 6 + [1] * 6, [-1, -1, 2, 2], 3), here)
    with pytest.raises(UserError, match="no class has 4 training images with and without it"):
        tables.usable(task([[1, 0]] * 12, [[1, 0]] * 4, 2, "mean average precision"), here)


def test_validation_takes_a_share_of_every_class():
    y = torch.tensor([0] * 50 + [1] * 10 + [2] * 4)
    held = linear.held_out(y, 0)
    assert [int(held[y == c].sum()) for c in range(3)] == [10, 2, 1]
    many = (torch.rand(60, 3, generator=torch.Generator().manual_seed(0)) < 0.3).long()
    held = linear.held_out(many, 0)
    assert all((part > 0).any(0).all() and (part == 0).any(0).all() for part in (many[held], many[~held]))


@pytest.mark.parametrize("metric", ["accuracy", "mean per-class accuracy", "mean average precision"])
def test_one_token_is_scored_as_scikit_learn_scores_it(metric):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score, balanced_accuracy_score

    generator = torch.Generator().manual_seed(0)
    label = torch.arange(160) % 3
    x = torch.randn(3, 6, generator=generator)[label] + torch.randn(160, 6, generator=generator)
    y = torch.nn.functional.one_hot(label, 3) if metric == "mean average precision" else label
    score, right = tables.one(x[:100], x[100:], y[:100], y[100:], metric, strengths=[1.0])
    size = (x[:100] - x[:100].mean(0)).square().mean().sqrt()
    a, b = (x[:100] / size).numpy(), (x[100:] / size).numpy()
    if metric == "mean average precision":
        per = [
            average_precision_score(y[100:, c], LogisticRegression(C=1.0).fit(a, y[:100, c]).decision_function(b))
            for c in range(3)
        ]
        assert score == pytest.approx(sum(per) / 3, abs=0.005) and right is None
    else:
        guess = LogisticRegression(C=1.0).fit(a, label[:100]).predict(b)
        wanted = (
            balanced_accuracy_score(label[100:], guess)
            if "per-class" in metric
            else (guess == label[100:].numpy()).mean()
        )
        assert score == pytest.approx(wanted, abs=0.02) and right.shape == (60,)


def test_many_images_go_through_sgd(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    x = torch.randn(2, 6, generator=generator)[y] * 3 + torch.randn(200, 6, generator=generator)
    exact, _ = tables.one(x[:100], x[100:], y[:100], y[100:], "accuracy")
    monkeypatch.setattr(tables, "EXACT", 10)
    monkeypatch.setattr(tables_sgd.fit_selected, "__defaults__", (100, 32))
    streamed, _ = tables.one(x[:100], x[100:], y[:100], y[100:], "accuracy")
    assert streamed == pytest.approx(exact, abs=0.03)


@pytest.mark.slow
def test_outliers_of_the_planted_control_hold_what_was_planted(planted):
    random = dataclasses.replace(zoo.load("mini-random", "cpu"), label="mini-random")
    problems = tables_tasks.load("scenes:background,colour,texture", 250, 200)
    found = tables.classify([random, planted], problems, draws=2)
    table = found.table.score
    assert found.owner == {"mini-random": "planted", "planted": "planted"} and found.cutoffs[
        "mini-random", "scenes"
    ] == float("inf")
    assert table.index[0][0] == "mini-random"  # the order in which the models were given
    for name in ("background", "colour", "texture"):
        row = table.xs(("planted", name), level=("model", "task"))
        assert row["outlier"] == pytest.approx(row["planted"], abs=0.1), name
    gaps = tables.gaps(found)
    assert gaps.low["planted", "background"] > 10
    assert gaps.low["mini-random", "colour"] < 5
    assert ("mini-random", "colour", "planted") not in table.index
    prints = {f for row in found.table.features for f in row.split()}
    assert prints <= {key[:12] for key in found.about}
    again = tables.classify([random, planted], problems, draws=2)
    pd.testing.assert_frame_equal(found.table, again.table)  # the same digits


def test_registers_are_draws_and_models_without_outliers_have_no_such_rows():
    torch.manual_seed(0)
    module = mini.build("xxs", registers=3).eval().requires_grad_(False)
    model = Model("m", module, "4" * 64, input_size=96, label="m")
    found = tables.classify([model], tables_tasks.load("scenes:colour", 60, 40), draws=2).table
    assert found.index.get_level_values("token").tolist() == ["cls", "normal", "register"]
    assert found.draws.tolist() == [1, 2, 3] and pd.isna(found.sd.iloc[0])
    assert (found.score >= 0).all() and (found.train == 60).all()


def test_gaps_are_paired_and_in_points():
    right = {
        ("m", "t", a): torch.tensor([v]).double() for a, v in (("outlier", [1, 1, 1, 0]), ("matched", [1, 1, 0, 0]))
    }
    rows = [
        {"model": "m", "task": "t", "token": k, "score": s, "sd": 0.1} for k, s in (("outlier", 0.75), ("matched", 0.5))
    ]
    table = pd.DataFrame(rows).set_index(["model", "task", "token"])
    gap = tables.gaps(tables.Classified(table, right)).loc["m", "t"]
    assert gap.gap == 25 and gap.low >= 0 and gap.high <= 75 and gap.sd == 10
    mean, low, high = tables.over_tasks(pd.DataFrame({"gap": [1.0, 2.0, 3.0]}))
    assert (
        mean == 2
        and low == pytest.approx(2 - 4.303 / 3**0.5, abs=1e-3)
        and high == pytest.approx(2 + 4.303 / 3**0.5, abs=1e-3)
    )
