"""Claims of Tables 1, 4 and 6 about what one token tells of its image, judged on `tables.Classified` results.

Verdicts on outliers rest on the matched token (the nearest normal one) where the paper compares with a random normal
one; the paper's own comparison stands beside. A gap counts where its interval over test images excludes 0. Each
function yields (claim id, verdict, what was measured[, text, "none"]) for `Run.claim`. Points are percentage points.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import tables
import torch
from verdicts import above, every, majority, within

from vitreg_lib.base import DATA
from vitreg_lib.data import sets
from vitreg_lib.measure.pairs import pairs as of_models

COLUMNS = "IN1k P205 Airc. CF10 CF100 CUB Cal101 Cars DTD Flow. Food Pets SUN VOC".split()  # claims C066 to C079
FEW = 5  # tasks, below which nothing is said of tasks at large
MARGIN = 5  # points: a gap within them counts as none, where the claim is that there is none
PARTS_OF = {"cifar10-small": "CF10", "caltech101-small": "Cal101"}  # small parts of the paper's sets, named as such
HARD = ("IN1k", "P205")  # the two sets on which the paper's outliers trail cls clearly
_TABLE4 = {
    "C108": "registers leave the score of cls unchanged (1.5 points)",
    "C109": "a register tells more than a normal patch",
    "C110": "registers leave the score of a normal patch unchanged (3 points)",
}


def reported():
    """The paper's Table 1 with the spread of Table 6: a DataFrame by (task, token), score and sd from 0 to 1."""
    rows = pd.read_csv(DATA / "reported" / "table6.csv")
    named = rows.setting.str.extract(r"token=\[?(?P<token>\w+)\]?;dataset=(?P<task>.+)")
    rows = rows.assign(token=named.token.str.lower(), task=named.task, share=rows.value / 100)
    rows["column"] = rows.metric.str.startswith("std").map({True: "sd", False: "score"})
    table = rows.pivot(index=["task", "token"], columns="column", values="share").rename_axis(columns=None)
    return table.loc[[(task, token) for task in COLUMNS for token in ("cls", "normal", "outlier")]]


def reported_by_registers() -> dict[str, dict[int, float]]:
    """The paper's Table 4: {token: {registers: score in %}}, of the columns that can be read."""
    rows = pd.read_csv(DATA / "reported" / "table4.csv").dropna(subset="value")
    token = rows.setting.str.extract(r"token=\[?([^\];]+)")[0].str.lower()
    return {t: dict(zip(part.registers, part.value, strict=True)) for t, part in rows.groupby(token, sort=False)}


def measure(run, found: tables.Classified) -> None:
    """Put every score, spread and share of outliers into the record, each with the features it was computed from."""
    names = {m.label: m.name for m in run.models}
    paper = reported().score.to_dict()
    run.trace(found.about)
    for (model, task, token), row in found.table.iterrows():
        beside = paper.get((row.paper, token))
        name = f"{row.metric}, {task}, {token} token"
        run.measure(name, row.score, names[model], paper=beside, features=row.features)
        if row.draws > 1:
            run.measure(
                f"sd over {row.draws} draws, {task}, {token} token", row.sd, names[model], features=row.features
            )
    for (model, problem), cut in found.cutoffs.items():
        run.measure(f"cutoff, {problem}", cut, names[model], paper=150)
    for (model, problem), share in found.shares.items():
        own = found.owner.get(model) == model
        measured = "outlier_share" if own else f"share of places borrowed from {found.owner.get(model, 'nobody')}"
        run.measure(f"{measured}, {problem}", share, names[model], paper=0.0237 if own else None)


def subject(found: tables.Classified, models) -> str | None:
    """The first trained model that has outliers of its own; None without one."""
    return next((m.label for m in models if m.role == "trained" and found.owner.get(m.label) == m.label), None)


def of_table1(found: tables.Classified, models) -> Iterator[tuple]:
    """C066 to C083 on the paper's data sets or parts of them, then ours: the same two questions on all tasks here.

    Each set is judged on the first trained model that has artifacts on its images.
    """
    name, columns = subject(found, models), found.table.paper.groupby(level="task", sort=False).first()
    fair, plain = (tables.gaps(found, "outlier", other) for other in ("matched", "normal"))
    titles = {e["paper"]: e["title"] for e in sets.entries().values() if "paper" in e}
    judged = _judged(found, models, fair)
    tasks = {PARTS_OF.get(t) or columns[t]: t for m, t in fair.index if m == name and (t in PARTS_OF or columns[t])}
    for number, column in enumerate(COLUMNS):
        claim, (label, task) = f"C{66 + number:03d}", judged.get(column, (None, None))
        if task is None:
            yield claim, None, f"needs {titles[column]} and a trained model with artifacts on its images"
        else:
            row = found.table.loc[label, task, "outlier"]
            about = f"{label} on {task} ({row.classes} classes, {row.train} and {row.test} photos with an outlier)"
            yield claim, _more(fair, label, task), f"{about}: {_gap_in_words(fair, plain, label, task)}"
    if name is None:
        why = "no trained model here has outliers; the controls are judged below"
        yield from ((claim, None, why) for claim in ("C080", "C082", "C083"))
    else:
        answers = {task: _more(fair, name, task) for task in tasks.values()}
        yield "C080", _of_all(answers), f"{name}: better on {_counted(answers)}"
        yield from _beside_cls(found, name, {task: column for column, task in tasks.items()})
    which = name or next((m.label for m in models if m.role == "trained"), None)
    over = tables.gaps(found, "cls", "normal")
    answers = {t: _more(over, which, t) for m, t in over.index if m == which and (columns[t] or t in PARTS_OF)}
    measured = f"{which}: cls better on {_counted(answers)}" if answers else "needs one of the paper's data sets"
    yield "C081", _of_all(answers), measured
    for label, gaps, text in (
        (name, fair, "an outlier token of {} tells more than its matched token on every task here"),
        (which, over, "cls of {} tells more than a random normal token on every task here"),
    ):
        answers = {task: _more(gaps, label, task) for model, task in gaps.index if model == label}
        if answers:
            key = "outlier" if gaps is fair else "cls"
            yield (
                f"ours-{key}-{label}",
                every(answers.values()),
                f"better on {_counted(answers)}",
                text.format(label),
                "none",
            )


def _judged(found: tables.Classified, models, gaps) -> dict[str, tuple[str, str]]:
    """{column of the paper's Table 1: (the first trained model with artifacts on its images, task)}, of those here."""
    specimens = [m.label for m in models if m.role == "trained" and found.owner.get(m.label) == m.label]
    columns, first = found.table.paper.groupby(level="task", sort=False).first(), {}
    for label, task in sorted((key for key in gaps.index if key[0] in specimens), key=lambda k: specimens.index(k[0])):
        if column := columns[task] or PARTS_OF.get(task):
            first.setdefault(column, (label, task))
    return first


def _beside_cls(found: tables.Classified, name: str, columns: dict[str, str]) -> Iterator[tuple]:
    """C082 and C083: how far outliers trail cls on the paper's sets, {task: column}; fewer than all cannot confirm."""
    behind = tables.gaps(found, "cls", "outlier")
    for claim, chosen, limit, sign in (
        ("C082", [t for t, column in columns.items() if column not in HARD], 10, -1),
        ("C083", [t for t, column in columns.items() if column in HARD], 5, 1),
    ):
        answers = []
        for task in chosen:
            low, high = _ends(behind, name, task)
            answers.append(above(*sorted((sign * low, sign * high)), sign * limit))
        text = ", ".join(f"{t} {behind.gap[name, t]:+.0f}" for t in chosen)
        missing = "needs ImageNet-1k or Places205" if claim == "C083" else "needs one of the paper's other 12 sets"
        verdict, all_of_them = every(answers), len(COLUMNS) - len(HARD) if claim == "C082" else len(HARD)
        holds = verdict if verdict is False or len(chosen) == all_of_them else None
        yield claim, holds, f"{name}: cls less outlier {text}" if chosen else missing


def _ends(gaps, name: str, task: str) -> tuple[float, float]:
    """The interval of a gap over test images; twice the spread over draws where there is none (average precision)."""
    row = gaps.loc[(name, task)]
    return (row.low, row.high) if row.low == row.low else (row.gap - 2 * row.sd, row.gap + 2 * row.sd)


def _more(gaps, name: str, task: str) -> bool | str:
    return above(*_ends(gaps, name, task))


def _of_all(answers: dict) -> bool | str | None:
    """The verdict on all 14 data sets of the paper: one can refute it, fewer than all cannot confirm it."""
    verdict = every(answers.values())
    return verdict if verdict is False or len(answers) == len(COLUMNS) else None


def _counted(answers: dict) -> str:
    kinds = {True: [], False: [], "undecided": []}
    for task, answer in answers.items():
        kinds[answer].append(task)
    others = "".join(
        f"; {word} {', '.join(kinds[k])}"
        for k, word in ((False, "worse on"), ("undecided", "undecided on"))
        if kinds[k]
    )
    return f"{len(kinds[True])} of the {len(answers)} tasks that are here{others}"


def of_table6(found: tables.Classified, models) -> Iterator[tuple]:
    """C084: the spread over draws beside the gap of outlier and matched token; fewer than all sets cannot confirm."""
    fair, plain = (tables.gaps(found, "outlier", other) for other in ("matched", "normal"))
    answers, texts = {}, []
    for key in _judged(found, models, fair).values():
        (low, high), gap, other = _ends(fair, *key), fair.loc[key], plain.loc[key]
        answers[key[1]] = above(low, high, gap.sd)
        texts.append(
            f"{key[0]}, {key[1]}, {found.table.draws[(*key, 'outlier')]} draws: gap {gap.gap:+.0f} ({low:+.0f} to "
            f"{high:+.0f}), sd {gap.sd:.1f} (to a random normal token {other.gap:+.0f}, sd {other.sd:.1f})"
        )
    measured = f"{len(answers)} of the {len(COLUMNS)} sets that the claim is about: {'; '.join(texts)}"
    missing = "needs one of the paper's data sets and a trained model with artifacts on its images"
    yield "C084", _of_all(answers) if answers else None, measured if answers else missing


def of_controls(found: tables.Classified, models) -> Iterator[tuple]:
    """Ours: the planted outliers tell what was planted, random tokens no more than others; clean and mended models."""
    fair, plain = (tables.gaps(found, "outlier", other) for other in ("matched", "normal"))
    for model in models:
        name = model.label
        if name not in fair.index.get_level_values(0):
            continue
        (mean, low, high), normal = tables.over_tasks(fair.loc[name]), tables.over_tasks(plain.loc[name])
        measured = (
            f"over {len(fair.loc[name])} tasks {mean:+.0f} points ({low:+.0f} to {high:+.0f}) against matched tokens, "
        )
        measured += f"{normal[0]:+.0f} ({normal[1]:+.0f} to {normal[2]:+.0f}) against random normal ones"
        lender = found.owner[name]
        if model.role == "planted control":
            yield from _of_planted(found, name, fair)
            text = f"{name}: outlier tokens tell more of the image than matched normal ones, over all tasks"
            yield f"control-{name}-all", above(low, high), measured, text, "none"
        elif model.role == "random control":
            text = f"{name}: fresh weights, tokens at the places of {lender}'s outliers tell neither more nor less"
            yield f"control-{name}", *_no_gap(fair.loc[name], measured), text, "none"
        elif model.role == "trained" and lender != name:
            text = f"{name} has no outliers: its tokens at the places of {lender}'s tell neither more nor less"
            yield f"clean-{name}", *_no_gap(fair.loc[name], measured), text, "none"
        elif model.role == "mended" and lender != name:
            yield from _of_moved(found, name, lender)


def _no_gap(gap, over_all: str) -> tuple[bool | str | None, str]:
    """Whether the interval over tasks lies within `MARGIN`; with fewer than `FEW` tasks, that of each over images."""
    if len(gap) >= FEW:
        _, low, high = tables.over_tasks(gap)
        return within(low, high, MARGIN), over_all
    known = gap.dropna(subset=["low"])
    rows = list(known[["gap", "low", "high"]].itertuples())
    each = ", ".join(f"{t} {g:+.0f} ({a:+.0f} to {b:+.0f})" for t, g, a, b in rows)
    holds = every(within(low, high, MARGIN) for _, _, low, high in rows)
    return holds, f"points against matched tokens: {each or 'no interval is known'}"


def _of_planted(found: tables.Classified, name: str, fair) -> Iterator[tuple]:
    """What was planted is known: it can be classified itself, and the outlier token should do as well as it."""
    scores = found.table.score.to_dict()
    tasks = list(fair.loc[name].index)
    truth = pd.Series({t: 100 * scores[name, t, "planted"] for t in tasks})
    got = pd.Series({t: 100 * scores[name, t, "outlier"] for t in tasks})
    matched = pd.Series({t: 100 * scores[name, t, "matched"] for t in tasks})
    off, r = (got - truth).abs().mean(), (got - matched).corr(truth - matched) if len(tasks) > 2 else float("nan")
    text = f"{name}: what an outlier token tells is what was planted (within 5 points in the mean, r above 0.9)"
    measured = f"{off:.0f} points off over {len(tasks)} tasks; r {r:.2f} of the gap to the matched token"
    yield f"control-{name}-planted", (off < 5 and r > 0.9) if len(tasks) > 2 else None, measured, text, "none"
    difference = tables.gaps(found, "planted", "matched").loc[name]
    telling = [t for t in tasks if difference.low[t] > 0]
    measured = ", ".join(f"{t} {fair.gap[name, t]:+.0f}" for t in telling) or "no task with more planted is known"
    text = f"{name}: where what was planted tells more than a matched normal token, the outlier token does too"
    yield f"control-{name}", every(_more(fair, name, t) for t in telling), measured, text, "none"


def _of_moved(found: tables.Classified, name: str, lender: str) -> Iterator[tuple]:
    """The clean test: the same tokens of the same model, with the artifact and with it moved to added registers."""
    scores = found.table.score.to_dict()
    tasks = [t for m, t, token in scores if m == name and token == "outlier"]
    lost = [t for t in tasks if scores[lender, t, "outlier"] > scores[name, t, "outlier"]]
    measured = ", ".join(
        f"{t} {100 * scores[lender, t, 'outlier']:.0f} → {100 * scores[name, t, 'outlier']:.0f}" for t in tasks
    )
    text = f"with the artifact moved ({name}), the tokens at the same places of the same images tell less"
    yield f"moved-{name}", _most(lost, tasks), f"{len(lost)} of {len(tasks)}: {measured}", text, "none"
    if any(token == "register" for m, _, token in scores if m == name):
        more = [t for t in tasks if scores[name, t, "register"] > scores[name, t, "normal"]]
        measured = ", ".join(f"{t} {100 * scores[name, t, 'register']:.0f}" for t in tasks)
        text = f"the added registers of {name} tell more than a random normal token"
        yield f"registers-{name}", _most(more, tasks), f"{len(more)} of {len(tasks)}: {measured}", text, "none"


def _most(some: list, tasks: list) -> bool | str:
    """Are these most of the tasks, by more than chance gives?"""
    return majority(torch.tensor([task in some for task in tasks]))


def of_table4(found: tables.Classified, models, pairs: dict[str, str]) -> Iterator[tuple]:
    """C108 to C110 on the trained pair whose model without has artifacts, of fewest registers (the paper has one).

    pairs: {model with registers: without}. Ours on every other pair that is here.
    """
    with_trained, number = of_models(models, "trained"), {m.label: m.registers for m in models}
    trained = [(name, base) for name, base in with_trained.items() if found.owner.get(base) == base]
    trained = min(trained, key=lambda pair: number[pair[0]]) if trained else next(iter(with_trained.items()), None)
    for claim in _TABLE4:
        if trained is None:
            yield (
                claim,
                None,
                "needs one model trained with and without registers; test-time registers are judged below",
            )
        else:
            yield claim, *_register_verdict(claim, found, *trained)
    for pair in pairs.items():
        if pair != trained:
            for claim, text in _TABLE4.items():
                yield (
                    f"{claim}-{pair[0]}",
                    *_register_verdict(claim, found, *pair),
                    f"ours, as {claim}: {pair[0]}: {text}",
                    "none",
                )


def _register_verdict(claim: str, found: tables.Classified, name: str, base: str) -> tuple[bool | str | None, str]:
    """None where the model without registers has no outliers, whose role a register could take over."""
    scores, task = found.table.score.to_dict(), found.table.loc[name].index[0][0]
    limit = {"C108": 1.5, "C109": None, "C110": 3}[claim]
    token = "cls" if claim == "C108" else "normal"
    one, other = ((name, "register"), (name, "normal")) if claim == "C109" else ((name, token), (base, token))
    values = [100 * scores[model, task, kind] for model, kind in (one, other)]
    low, high = tables.interval(*(found.right.get((model, task, kind)) for model, kind in (one, other)))
    span = f" ({low:+.0f} to {high:+.0f})" if low == low else ""
    if claim == "C109":
        text = f"{name}, {task}: register {values[0]:.0f}, normal patch {values[1]:.0f}, difference{span} points"
        if found.owner.get(base) == base:
            text += f"; outlier of {base} {100 * scores[base, task, 'outlier']:.0f}"
    else:
        difference = f"{values[0] - values[1]:+.0f}{span} points"
        text = f"{task}, {token}: {base} {values[1]:.0f}, {name} {values[0]:.0f}, difference {difference}"
    if found.owner.get(base) != base:
        return None, f"no artifacts without registers: {name} ({text})"
    return above(low, high) if limit is None else within(low, high, limit), text


def _gap_in_words(fair, plain, name: str, task: str) -> str:
    low, high = fair.low[name, task], fair.high[name, task]
    interval = f" ({low:+.0f} to {high:+.0f})" if low == low else ""
    plain_gap = plain.gap[name, task]
    return f"{fair.gap[name, task]:+.0f} points{interval} to matched, {plain_gap:+.0f} to a random normal token"


def of_spread(found: tables.Classified, models) -> Iterator[tuple]:
    """Ours on the controls: on most tasks the gap to the matched token exceeds the spread where one was planted."""
    for model in (m for m in models if m.is_control and m.label in found.owner):
        gap = tables.gaps(found, "outlier", "matched").loc[model.label]
        clear, planted = list(gap.index[gap.gap.abs() > gap.sd]), model.role == "planted control"
        text = f"{model.label}: the gap to the matched token exceeds the spread on most tasks"
        if not planted:
            text = f"{model.label}: on most tasks the gap does not exceed the spread"
        expected = len(clear) * 2 > len(gap) if planted else len(clear) * 2 < len(gap)
        yield (
            f"control-{model.label}",
            expected,
            f"{len(clear)} of {len(gap)} tasks: {', '.join(clear) or 'none'}",
            text,
            "none",
        )
