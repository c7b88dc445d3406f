"""Claims of Tables 1, 4 and 6 about what one token tells of its image, judged on `tokens.Classified` results.

Verdicts on outliers rest on the matched token (the nearest normal one) where the paper compares with a random normal
one; the paper's own comparison stands beside. Each function yields (claim id, holds or None, what was measured[, text])
for `Run.claim`. Points are percentage points.
"""

from collections.abc import Iterator

from ..data import registry
from ..paths import DATA
from . import tokens

COLUMNS = "IN1k P205 Airc. CF10 CF100 CUB Cal101 Cars DTD Flow. Food Pets SUN VOC".split()  # claims C066 to C079
FEW = 5  # tasks, below which nothing is said of tasks at large
HARD = ("IN1k", "P205")  # the two sets on which the paper's outliers trail cls clearly


def reported():
    """The paper's Table 1 with the spread of Table 6: a DataFrame by (task, token), score and sd from 0 to 1."""
    import pandas as pd

    rows = pd.read_csv(DATA / "reported" / "table6.csv")
    named = rows.setting.str.extract(r"token=\[?(?P<token>\w+)\]?;dataset=(?P<task>.+)")
    rows = rows.assign(token=named.token.str.lower(), task=named.task, share=rows.value / 100)
    rows["column"] = rows.metric.str.startswith("std").map({True: "sd", False: "score"})
    table = rows.pivot(index=["task", "token"], columns="column", values="share").rename_axis(columns=None)
    return table.loc[[(task, token) for task in COLUMNS for token in ("cls", "normal", "outlier")]]


def reported_by_registers() -> dict[str, dict[int, float]]:
    """The paper's Table 4: {token: {registers: score in %}}, of the columns that can be read."""
    import pandas as pd

    rows = pd.read_csv(DATA / "reported" / "table4.csv").dropna(subset="value")
    token = rows.setting.str.extract(r"token=\[?([^\];]+)")[0].str.lower()
    return {t: dict(zip(part.registers, part.value, strict=True)) for t, part in rows.groupby(token, sort=False)}


def measure(run, found: tokens.Classified) -> None:
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
    for model, cut in found.cutoffs.items():
        run.measure("cutoff", cut, names[model], paper=150)
    for (model, problem), share in found.shares.items():
        own = found.owner.get(model) == model
        told = "outlier_share" if own else f"share of places borrowed from {found.owner.get(model, 'nobody')}"
        run.measure(f"{told}, {problem}", share, names[model], paper=0.0237 if own else None)


def subject(found: tokens.Classified, models) -> str | None:
    """The first trained model that has outliers of its own; None without one."""
    return next((m.label for m in models if m.role == "trained" and found.owner.get(m.label) == m.label), None)


def of_table1(found: tokens.Classified, models) -> Iterator[tuple]:
    """C066 to C083."""
    name, scores = subject(found, models), found.table.score.to_dict()
    columns = found.table.paper.groupby(level="task", sort=False).first()
    fair, plain = (tokens.gaps(found, "outlier", other) for other in ("matched", "normal"))
    titles = {e["paper"]: e["title"] for e in registry.entries().values() if "paper" in e}
    for number, column in enumerate(COLUMNS):
        task = next((t for t, c in columns.items() if c == column), None)
        if task is None or name is None:
            yield f"C{66 + number:03d}", None, f"needs {titles[column]} and a trained model with outliers"
        else:
            yield f"C{66 + number:03d}", bool(fair.gap[name, task] > 0), f"{name}: {_told(fair, plain, name, task)}"
    if name is None:
        why = "no trained model here has outliers; the controls are judged below"
        yield from ((claim, None, why) for claim in ("C080", "C082", "C083"))
    else:
        tasks = list(fair.loc[name].index)
        more = [t for t in tasks if fair.gap[name, t] > 0]
        told = "; ".join(f"{t}: {_told(fair, plain, name, t)}" for t in tasks)
        yield "C080", len(more) == len(tasks), f"{name}, {len(more)} of {len(tasks)} sets run ({told})"
        behind = {t: 100 * (scores[name, t, "cls"] - scores[name, t, "outlier"]) for t in tasks}
        for claim, chosen, limit in (
            ("C082", [t for t in tasks if columns[t] not in HARD], lambda gap: gap < 10),
            ("C083", [t for t in tasks if columns[t] in HARD], lambda gap: gap > 5),
        ):
            told = f"{name}: cls less outlier " + ", ".join(f"{t} {behind[t]:+.0f}" for t in chosen)
            holds = all(limit(behind[t]) for t in chosen) if chosen else None
            yield claim, holds, told if chosen else "needs ImageNet-1k or Places205"
    which = name or next((m.label for m in models if m.role == "trained"), None)
    tasks = [t for m, t, token in scores if m == which and token == "cls"]
    more = [t for t in tasks if scores[which, t, "cls"] > scores[which, t, "normal"]]
    told = f"{which}: {len(more)} of {len(tasks)}" + (
        f"; not {', '.join(t for t in tasks if t not in more)}" * (more != tasks)
    )
    yield "C081", len(more) == len(tasks) if tasks else None, told if tasks else "no trained model here"


def of_table6(found: tokens.Classified, models) -> Iterator[tuple]:
    """C084: the spread over draws beside the gap of outlier and matched token, on every set."""
    name = subject(found, models)
    if name is None:
        yield "C084", None, "no trained model here has outliers; the planted control is judged below"
        return
    gap = tokens.gaps(found, "outlier", "matched").loc[name]
    plain = tokens.gaps(found, "outlier", "normal").loc[name]
    told = "; ".join(
        f"{t}: gap {g:+.0f}, sd {s:.0f} (to a random normal token {p:+.0f}, sd {q:.0f})"
        for t, g, s, p, q in zip(gap.index, gap.gap, gap.sd, plain.gap, plain.sd, strict=True)
    )
    yield "C084", bool((gap.gap > gap.sd).all()), f"{name}: {told}"


def of_controls(found: tokens.Classified, models) -> Iterator[tuple]:
    """Ours: the planted outliers tell what was planted, random tokens no more than others; clean and mended models."""
    fair, plain = (tokens.gaps(found, "outlier", other) for other in ("matched", "normal"))
    for model in models:
        name = model.label
        if name not in fair.index.get_level_values(0):
            continue
        (mean, low, high), normal = tokens.over_tasks(fair.loc[name]), tokens.over_tasks(plain.loc[name])
        told = (
            f"over {len(fair.loc[name])} tasks {mean:+.0f} points ({low:+.0f} to {high:+.0f}) against matched tokens, "
        )
        told += f"{normal[0]:+.0f} ({normal[1]:+.0f} to {normal[2]:+.0f}) against random normal ones"
        lender = found.owner[name]
        if model.role == "planted control":
            yield from _of_planted(found, name, fair)
            text = f"ours: {name}: outlier tokens tell more of the image than matched normal ones, over all tasks"
            yield f"control-{name}-all", low > 0, told, text
        elif model.role == "random control":
            text = (
                f"ours: {name}: fresh weights, tokens at the places of {lender}'s outliers tell neither more nor less"
            )
            yield f"control-{name}", *_no_gap(fair.loc[name], told), text
        elif model.role == "trained" and lender != name:
            text = f"ours: {name} has no outliers: its tokens at the places of {lender}'s tell neither more nor less"
            yield f"clean-{name}", *_no_gap(fair.loc[name], told), text
        elif model.role == "mended" and lender != name:
            yield from _of_moved(found, name, lender)


def _no_gap(gap, told: str) -> tuple[bool | None, str]:
    """Whether the interval over tasks holds 0; with fewer than `FEW` tasks, whether that of each (over images) does."""
    if len(gap) >= FEW:
        _, low, high = tokens.over_tasks(gap)
        return low <= 0 <= high, told
    known = gap.dropna(subset=["low"])
    each = ", ".join(
        f"{t} {g:+.0f} ({a:+.0f} to {b:+.0f})" for t, g, a, b in known[["gap", "low", "high"]].itertuples()
    )
    holds = bool(((known.low <= 0) & (known.high >= 0)).all()) if len(known) else None
    return holds, f"points against matched tokens: {each or 'no interval is known'}"


def _of_planted(found: tokens.Classified, name: str, fair) -> Iterator[tuple]:
    """What was planted is known: it can be classified itself, and the outlier token should do as well as it."""
    import pandas as pd

    scores = found.table.score.to_dict()
    tasks = list(fair.loc[name].index)
    truth = pd.Series({t: 100 * scores[name, t, "planted"] for t in tasks})
    got = pd.Series({t: 100 * scores[name, t, "outlier"] for t in tasks})
    matched = pd.Series({t: 100 * scores[name, t, "matched"] for t in tasks})
    off, r = (got - truth).abs().mean(), (got - matched).corr(truth - matched) if len(tasks) > 2 else float("nan")
    text = f"ours: {name}: what an outlier token tells is what was planted (within 5 points in the mean, r above 0.9)"
    told = f"{off:.0f} points off over {len(tasks)} tasks; r {r:.2f} of measured and planted gap to the matched token"
    yield f"control-{name}-planted", (off < 5 and r > 0.9) if len(tasks) > 2 else None, told, text
    difference = tokens.gaps(found, "planted", "matched").loc[name]
    telling = [t for t in tasks if difference.low[t] > 0]
    more = [t for t in telling if fair.low[name, t] > 0]
    told = f"{len(more)} of {len(telling)}: " + ", ".join(f"{t} {fair.gap[name, t]:+.0f}" for t in telling)
    text = f"ours: {name}: where what was planted tells more than a matched normal token, the outlier token does too"
    yield f"control-{name}", more == telling if telling else None, told, text


def _of_moved(found: tokens.Classified, name: str, lender: str) -> Iterator[tuple]:
    """The clean test: the same tokens of the same model, with the artifact and with it moved to added registers."""
    scores = found.table.score.to_dict()
    tasks = [t for m, t, token in scores if m == name and token == "outlier"]
    lost = [t for t in tasks if scores[lender, t, "outlier"] > scores[name, t, "outlier"]]
    told = ", ".join(
        f"{t} {100 * scores[lender, t, 'outlier']:.0f} → {100 * scores[name, t, 'outlier']:.0f}" for t in tasks
    )
    text = f"ours: with the artifact moved ({name}), the tokens at the same places of the same images tell less"
    yield f"moved-{name}", 2 * len(lost) > len(tasks), f"{len(lost)} of {len(tasks)}: {told}", text
    if any(token == "register" for m, _, token in scores if m == name):
        more = [t for t in tasks if scores[name, t, "register"] > scores[name, t, "normal"]]
        told = ", ".join(f"{t} {100 * scores[name, t, 'register']:.0f}" for t in tasks)
        text = f"ours: the added registers of {name} tell more than a random normal token"
        yield f"registers-{name}", 2 * len(more) > len(tasks), f"{len(more)} of {len(tasks)}: {told}", text


def of_table4(found: tokens.Classified, models, pairs: dict[str, str]) -> Iterator[tuple]:
    """C108 to C110 on the pairs {model with registers: without} of trained models; ours on every pair that is here."""
    roles = {m.label: m.role for m in models}
    trained = next((pair for pair in pairs.items() if roles[pair[0]] == roles[pair[1]] == "trained"), None)
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
                )


_TABLE4 = {
    "C108": "registers leave the score of cls unchanged (1.5 points)",
    "C109": "a register tells more than a normal patch",
    "C110": "registers leave the score of a normal patch unchanged (3 points)",
}


def _register_verdict(claim: str, found: tokens.Classified, name: str, base: str) -> tuple[bool, str]:
    scores, task = found.table.score.to_dict(), found.table.index.get_level_values("task")[0]

    def points(model, token):
        return 100 * scores[model, task, token]

    if claim == "C109":
        told = f"{name}, {task}: register {points(name, 'register'):.0f}, normal patch {points(name, 'normal'):.0f}"
        if found.owner.get(base) == base:
            told += f"; outlier of {base} {points(base, 'outlier'):.0f}"
        return points(name, "register") > points(name, "normal"), told
    token, limit = ("cls", 1.5) if claim == "C108" else ("normal", 3)
    before, after = points(base, token), points(name, token)
    low, high = tokens.interval(found.right.get((name, task, token)), found.right.get((base, task, token)))
    interval = f" ({low:+.0f} to {high:+.0f})" if low == low else ""
    told = (
        f"{task}, {token}: {base} {before:.0f}, {name} {after:.0f}, difference {after - before:+.0f}{interval} points"
    )
    return abs(after - before) <= limit, told


def _told(fair, plain, name: str, task: str) -> str:
    low, high = fair.low[name, task], fair.high[name, task]
    interval = f" ({low:+.0f} to {high:+.0f})" if low == low else ""
    plain_gap = plain.gap[name, task]
    return f"{fair.gap[name, task]:+.0f} points{interval} to matched, {plain_gap:+.0f} to a random normal token"
