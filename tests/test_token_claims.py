"""Verdicts of Tables 1, 4 and 6 on scores that the test makes up, and the paper's own numbers."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pandas as pd
import pytest
import tables
import tables_claims
import tables_plots
import torch

from vitreg_lib.base import DATA


def model(label, role="trained", base="", registers=0):
    origin = {"trained": "trained", "mended": "test time"}.get(role, "none") if registers else "none"
    facts = dict(label=label, name=label, entry=label, role=role, base=base, registers=registers)
    return SimpleNamespace(**facts, registers_from=origin, is_control="control" in role)


def classified(scores: dict, owner: dict, paper: dict | None = None, known: bool = True) -> tables.Classified:
    """scores: {(model, task, token): score in %}; all with a spread of 1 point, right on the first of 400 images."""
    rows = [
        {"model": m, "task": t, "token": k, "score": v / 100, "sd": None if k == "cls" else 0.01, "draws": 3}
        | {"paper": (paper or {}).get(t, ""), "metric": "accuracy", "features": "f", "chance": 0.1}
        | {"classes": 10, "train": 100, "test": 400}
        for (m, t, k), v in scores.items()
    ]
    table = pd.DataFrame(rows).set_index(["model", "task", "token"]).astype({"sd": float})
    right = (
        {key: (torch.arange(400) < 4 * value).double().expand(3, -1) for key, value in scores.items()} if known else {}
    )
    shares = {(m, "s"): 0.02 for m in owner}
    return tables.Classified(table, right, owner, cutoffs={(m, "s"): 10.0 for m in owner}, shares=shares)


def row(name, task, **scores):
    return {(name, task, token): value for token, value in scores.items()}


def test_the_papers_numbers_are_those_of_its_tables():
    paper = tables_claims.reported()
    assert list(paper.index.unique("task")) == tables_claims.COLUMNS and len(paper) == 3 * 14
    with open(DATA / "reported" / "table1.csv", newline="") as f:
        for line in csv.DictReader(f):
            token, task = (part.partition("=")[2] for part in line["setting"].split(";"))
            assert 100 * paper.score[task, token.strip("[]").lower()] == pytest.approx(float(line["value"]))
    assert tables_claims.reported_by_registers() == {"cls": {0: 84.6, 1: 85.2}}
    gaps = tables.reported_gaps(paper)
    assert gaps.gap["Cars"] == pytest.approx(74.4) and gaps.sd.max() == pytest.approx(2.1)


def test_table_1_rests_on_the_matched_token_of_the_first_trained_model_with_outliers():
    scores = row("a", "x", cls=90, normal=30, matched=50, outlier=80) | row(
        "a", "y", cls=90, normal=30, matched=80, outlier=70
    )
    found = classified(scores, {"a": "a", "p": "p"}, {"x": "Airc.", "y": "CF10"})
    models = [model("p", "planted control"), model("a")]
    judged = {claim: (holds, told) for claim, holds, told, *_ in tables_claims.of_table1(found, models)}
    assert len([claim for claim in judged if claim.startswith("C")]) == 18
    assert judged["C068"][0] is True and "+30 points (+26 to +34) to matched, +50 to a random" in judged["C068"][1]
    assert judged["C069"][0] is False  # better than a random normal token, worse than its neighbour
    assert judged["C066"] == (None, "needs ImageNet-1k (ILSVRC 2012) and a trained model with artifacts on its images")
    assert judged["C080"] == (False, "a: better on 1 of the 2 tasks that are here; worse on y")
    assert judged["C082"][0] is False and judged["C083"][0] is None
    assert judged["ours-outlier-a"][0] is False and judged["ours-cls-a"][0] is True


def test_two_data_sets_cannot_show_what_is_claimed_of_all_14():
    better = row("a", "x", cls=90, normal=30, matched=50, outlier=80)
    few = classified(better, {"a": "a"}, {"x": "Airc."})
    judged = {claim: holds for claim, holds, *_ in tables_claims.of_table1(few, [model("a")])}
    assert judged["C068"] is True and judged["C080"] is None and judged["C081"] is None
    tasks = {f"t{i}": column for i, column in enumerate(tables_claims.COLUMNS)}
    many = {key: v for t in tasks for key, v in row("a", t, cls=90, normal=30, matched=50, outlier=80).items()}
    judged = {c: h for c, h, *_ in tables_claims.of_table1(classified(many, {"a": "a"}, tasks), [model("a")])}
    assert judged["C080"] is True and judged["C081"] is True
    close = {key: 50.0 if key[1:] == ("t3", "outlier") else v for key, v in many.items()}
    judged = {c: h for c, h, *_ in tables_claims.of_table1(classified(close, {"a": "a"}, tasks), [model("a")])}
    assert judged["C069"] == judged["C080"] == "undecided"


def test_without_a_model_with_outliers_nothing_of_the_paper_is_judged_but_cls():
    found = classified(row("a", "x", cls=90, normal=95), {}, {"x": "Airc."})
    judged = {claim: holds for claim, holds, *_ in tables_claims.of_table1(found, [model("a")])}
    assert {judged[c] for c in judged if c not in ("C081", "ours-cls-a")} == {None}
    assert judged["C081"] is False and judged["ours-cls-a"] is False
    assert next(tables_claims.of_table6(found, [model("a")]))[1] is None


def test_the_spread_is_compared_with_the_gap():
    def judged(outlier, tasks, name="a"):
        scores = {k: v for t in tasks for k, v in row("a", t, normal=30, matched=50, outlier=outlier).items()}
        return next(tables_claims.of_table6(classified(scores, {"a": "a"}, tasks), [model(name)]))[1:]

    all_of_them = {f"t{i}": column for i, column in enumerate(tables_claims.COLUMNS)}
    assert [judged(outlier, all_of_them)[0] for outlier in (50, 51, 55)] == [False, "undecided", True]
    assert judged(50, {"x": "Airc."})[0] is False  # one set can refute what is claimed of all, and cannot confirm it
    holds, measured = judged(55, {"cifar10-small": "", "scenes": ""})
    assert holds is None and measured.startswith(
        "1 of the 14 sets that the claim is about: a, cifar10-small, 3 draws: gap +5 (+3 to +7)"
    )
    assert judged(55, all_of_them, "b") == (
        None,
        "needs one of the paper's data sets and a trained model with artifacts on its images",
    )


def test_controls_and_mended_models():
    scores = {}
    for i, task in enumerate("wxyz"):
        scores |= row("p", task, cls=90, normal=30, matched=40, outlier=40 + 10 * i, planted=39 + 10 * i)
        scores |= row("r", task, cls=20, normal=20 + i, matched=21, outlier=20 + 2 * (i % 2))
        scores |= row("p+ttr1", task, cls=90, normal=30, matched=40, outlier=35, register=60)
    owner = {"p": "p", "r": "p", "p+ttr1": "p"}
    models = [model("p", "planted control"), model("r", "random control"), model("p+ttr1", "mended")]
    judged = {c: (h, m) for c, h, m, *_ in tables_claims.of_controls(classified(scores, owner), models)}
    assert judged["control-p-planted"][0] and judged["control-p"][0] is True
    assert judged["control-r"][0] is True and "w -1 (-2 to -0)" in judged["control-r"][1]
    assert judged["moved-p+ttr1"][0] == "undecided"  # four of four tasks: one in 16 by chance
    assert judged["registers-p+ttr1"][0] == "undecided"
    judged = {c: (h, m) for c, h, m, *_ in tables_claims.of_controls(classified(scores, owner, known=False), models)}
    assert judged["control-r"] == (None, "points against matched tokens: no interval is known")
    assert judged["control-p"][0] is None  # no task is known to tell more


def test_no_gap_is_said_of_tasks_at_large_only_where_there_are_enough():
    many = pd.DataFrame({"gap": [1.0, -1.0, 2.0, -2.0, 0.5], "low": -1.0, "high": 1.0})
    assert tables_claims._no_gap(many, "measured") == (True, "measured")
    assert tables_claims._no_gap(many + 20, "")[0] is False and tables_claims._no_gap(many + 5, "")[0] == "undecided"
    few = pd.DataFrame({"gap": [10.0, 1.0], "low": [6.0, -1.0], "high": [15.0, 3.0]}, index=["x", "y"])
    assert tables_claims._no_gap(few, "") == (
        False,
        "points against matched tokens: x +10 (+6 to +15), y +1 (-1 to +3)",
    )


def test_table_4_is_judged_on_the_trained_pair_and_ours_on_the_others():
    scores = row("a", "k", cls=60, normal=20, outlier=50) | row("a-reg1", "k", cls=60, normal=31, register=40)
    scores |= row("p", "k", cls=50, normal=20, outlier=45) | row("p+ttr1", "k", cls=57, normal=20, register=9)
    models = [model("a"), model("a-reg1", base="a", registers=1)]
    models += [model("p", "planted control"), model("p+ttr1", "mended", "p", 1)]
    pairs = {"a-reg1": "a", "p+ttr1": "p"}
    found = classified(scores, {"a": "a", "p": "p"})
    judged = {claim: holds for claim, holds, *_ in tables_claims.of_table4(found, models, pairs)}
    assert [judged[c] for c in ("C108", "C109", "C110")] == [True, True, False]
    assert [judged[f"{c}-p+ttr1"] for c in ("C108", "C109", "C110")] == [False, False, True]
    clean = {c: h for c, h, *_ in tables_claims.of_table4(classified(scores, {"p": "p"}), models, pairs)}
    assert [clean[c] for c in ("C108", "C109", "C110")] == [None] * 3  # no outliers without registers
    alone = {c: h for c, h, *_ in tables_claims.of_table4(found, models[2:], {"p+ttr1": "p"})}
    assert alone["C108"] is None


def test_every_number_names_its_features():
    found = classified(row("a", "x", cls=90, normal=30, matched=50, outlier=80), {"a": "a"}, {"x": "Airc."})
    found.about = {"f" * 64: {"model_sha256": "0" * 64}}
    measured, traced = [], {}
    run = SimpleNamespace(models=[model("a")], trace=traced.update)
    run.measure = lambda name, value, model="", unit="", paper=None, features="": measured.append(
        (name, paper, features)
    )
    tables_claims.measure(run, found)
    scored = [m for m in measured if m[0].startswith("accuracy")]
    assert len(scored) == 4 and all(m[2] == "f" for m in scored) and traced == found.about
    assert dict((m[0], m[1]) for m in scored)["accuracy, x, outlier token"] == pytest.approx(0.791)


def test_figures_take_what_there_is():
    import matplotlib.pyplot as plt

    found = classified(row("a", "x", cls=90, normal=30, matched=50, outlier=80), {"a": "a"})
    table = found.table.xs("a", level="model")
    tables_plots.by_task({"a": table, "paper": tables_claims.reported()})
    tables_plots.gaps_by_task({"a": {t: tables.gaps(found, "outlier", t).loc["a"] for t in ("normal", "matched")}})
    tables_plots.by_registers(found.table.xs("x", level="task"), {"a": {"a": 0}}, "%", {"cls": {0: 84.6, 1: 85.2}})
    plt.close("all")
