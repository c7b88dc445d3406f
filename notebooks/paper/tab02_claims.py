"""The record of Table 2: scores with the paper's, and verdicts on what registers cost downstream."""

from __future__ import annotations

import math
from collections.abc import Iterator

import tab02
import tab02_zeroshot
from verdicts import FAMILIES, above, cured, every, within

from vitreg_lib.measure.pairs import pairs

REPORTED_ZEROSHOT = (0.599, 0.601)  # Table 2b, OpenCLIP without and with registers


def reported_changes(models) -> dict[tuple[str, str], float]:
    """{(model with registers, task): the change that the paper reports for models trained in the same way}."""
    before, after = (tab02.reported(registers=r) for r in (False, True))
    family = {model.label: model.family for model in models}
    changes = {key: after[key] - before[key] for key in after}
    alike = {of: [name for name in pairs(models) if family[name] in FAMILIES[of]] for of in FAMILIES}
    return {(name, task): change for (of, task), change in changes.items() for name in alike[of]}


def measure(run, models, table, change, asked) -> None:
    """Put `tab02.table`, `tab02.changes` and the accuracies of `tab02_zeroshot.evaluate` into the run's record."""
    with_registers, family = pairs(models), {model.label: model.family for model in models}
    for name, row in table.iterrows():
        paper = tab02.reported(registers=name in with_registers)
        for column, value in row.items():
            run.measure(column, value, name, paper=paper.get((family[name], column)))
    for (name, task), row in change.iterrows():
        run.measure(f"change of {task} with registers", row.change, name)
    for (name, question), row in asked.iterrows():
        paper = REPORTED_ZEROSHOT[name in with_registers]
        run.measure(f"zero-shot accuracy, {question}", row.accuracy, name, paper=paper)


def of_table2(models, table, change, hits: dict, having: dict, found: dict) -> Iterator[tuple]:
    """Yields the arguments of `Run.claim`: C085 to C094, then ours on added registers and on random weights.

    table: of `tab02.table`; change: of `tab02.changes`; hits: of `tab02_zeroshot.evaluate`; having: {task or
    "zeroshot": labels of the models with artifacts on its images}; found: {label: `tab02.Scores`}. The verdict on a
    family covers all its pairs that can be judged.
    """
    base, sources = pairs(models), {name: each.sources for name, each in found.items()}
    for (family, task), claim in tab02.CLAIMS.items():
        judged, missing = cured(models, having[task], family)
        answers = {
            n: tab02.judge(change.loc[n, task], task, tab02.TOLERANCE[task])
            for n in judged
            if (n, task) in change.index
        }
        if answers:
            said = {}
            for name, (_, measured) in answers.items():
                said.setdefault(sources[name][task], []).append(f"{name} {measured}")
            text = "; ".join(f"{source}: {', '.join(each)}" for source, each in said.items())
            yield claim, every(holds for holds, _ in answers.values()), text
        else:
            yield claim, None, f"no images with {task} are at hand" if judged else missing
    for name, task in (key for key in change.index if key[0] in pairs(models, "test time")):
        text = f"registers added to {base[name]} at test time do not worsen its {task}"
        holds, measured = tab02.judge(change.loc[name, task], task, tab02.TOLERANCE[task])
        yield f"ours-{name}-{task}", holds if base[name] in having[task] else None, measured, text, "none"
    for name in (m.label for m in models if m.role == "random control"):
        for task in (t for t in tab02.TASKS if t in table):
            sign = -1 if task in tab02.LOWER_IS_BETTER else 1
            alike = [n for n in table.index if n != name and sources[n].get(task) == sources[name].get(task)]
            others = sign * table[task][alike]
            worst, gap = others.idxmin(), others.min() - sign * table[task][name]
            spread = 2 * math.hypot(table[f"{task}_sd"][name], table[f"{task}_sd"][worst])
            measured = f"{name} {table[task][name]:.3f}, the worst other {table[task][worst]:.3f} ({worst})"
            measured += f", twice the spread over seeds {spread:.3f}"
            text = f"every other model beats fresh weights ({name}) in {task}"
            yield f"control-{name}-{task}", above(gap - spread, gap + spread), measured, text, "none"
    asked = {model for model, _ in hits}
    name = next((n for n in base if {n, base[n]} <= asked), None)
    if name is None:
        yield "C094", None, "no pair with text towers is at hand"
        return
    points, low, high = tab02_zeroshot.change(hits, base[name], name)
    text = f"{points:+.1f} points ({low:+.1f} to {high:+.1f}), mean of the questions"
    if base[name] in having["zeroshot"]:
        yield "C094", within(low, high, 0.5), f"{name}: {text}"
    else:
        yield "C094", None, f"no artifacts without registers: {name} ({text})"
