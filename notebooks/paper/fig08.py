"""Figure 8: scores by the number of registers, and their plot."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from tab02 import LOWER_IS_BETTER, PANELS, TASKS

from vitreg_lib.plots.style import PALETTE, styled

ASKED = {  # the claims of Figure 8 in this module's words
    "C030": "one register brings more than half of the best gain in masks and in depth",
    "C031": "the best number of registers is not 0 for masks nor for depth",
    "C032": "the class gains with more registers",
}


@styled
def scores_by_registers(ladders: dict) -> Figure:
    """Figure 8, below: the three scores by the number of registers; one line a family, bars: spread over seeds.

    ladders: {family: DataFrame of `probes.scores.table` with a column registers}.
    """
    tasks = [task for task in PANELS if any(task in table for table in ladders.values())]
    counts = sorted({int(c) for table in ladders.values() for c in table.registers})
    figure, axes = plt.subplots(1, len(tasks), figsize=(2.6 * len(tasks) + 0.2, 2.7), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        label, factor = PANELS[task]
        for number, (name, table) in enumerate(ladders.items()):
            x = np.array([counts.index(int(c)) for c in table.registers]) + 0.06 * (number - (len(ladders) - 1) / 2)
            spread = factor * table[f"{task}_sd"]
            axis.errorbar(x, factor * table[task], spread, marker="o", ms=4, lw=1.2, color=PALETTE[number], label=name)
        axis.set_xticks(range(len(counts)), counts)
        axis.set(xlabel="registers", ylabel=label + ("\n(lower is better)" if task == "rmse" else ""))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def ladders(models) -> dict[str, list]:
    """{ladder: models by number of registers, from none}, for each base with at least three numbers of one origin.

    A ladder is called by its base and where its registers come from: "mini-dinov2-reg" (trained), "vit-ti+ttr".
    """
    plain, result = {model.label: model for model in models}, {}
    for base, origin in dict.fromkeys((m.base, m.registers_from) for m in models if m.base in plain):
        members = [m for m in models if m.base == base and m.registers_from == origin]
        if len(members) >= 2:
            name = base + {"trained": "-reg", "test time": "+ttr"}.get(origin, f", {origin}")
            result[name] = [plain[base], *sorted(members, key=lambda model: model.registers)]
    return result


def rows(table, members):
    """The rows of one ladder's models in a table by label, with a column registers."""
    return table.loc[[m.label for m in members]].assign(registers=[m.registers for m in members])


def by_registers(table, counts) -> dict[str, tuple[bool | None, str]]:
    """{"C030", "C031", "C032": (verdict, what was measured)}: the claims of Figure 8 about the three tasks.

    table: rows of `table` for one ladder, with counts their numbers of registers, from 0. C030: one register has more
    than half of the best gain in masks and depth; C031: their best number is not 0; C032: the class gains with more
    (most registers above none, rank correlation above 0). None where a number or a gain is missing that it needs.
    """
    from scipy.stats import spearmanr

    gains = {}
    for task in (t for t in TASKS if t in table):
        sign, factor = (-1, 1) if task in LOWER_IS_BETTER else (1, 100)
        gains[task] = dict(zip(counts, factor * sign * (table[task] - table[task].iloc[0]), strict=True))
    unit = {task: "" if task in LOWER_IS_BETTER else " points" for task in TASKS}
    dense = {task: gain for task, gain in gains.items() if task != "accuracy"}
    best = {task: max(gain, key=gain.get) for task, gain in dense.items()}
    told = {
        t: f"{t}: 1 register {g.get(1, float('nan')):+.2f}, best {g[best[t]]:+.2f}{unit[t]} with {best[t]}"
        for t, g in dense.items()
    }
    result = {}
    if dense:
        enough = {0, 1} <= set(counts) and all(g[best[t]] > 0 for t, g in dense.items())
        first = all(g.get(1, 0) > g[best[t]] / 2 for t, g in dense.items())
        none = "" if enough else "; no gain, or no model with one register, to take the share of"
        result["C030"] = (bool(first) if enough else None, "; ".join(told.values()) + none)
        numbers = ", ".join(f"{t} {b}" for t, b in best.items())
        by_chance = f"; by chance alone another than 0 is the best of {len(counts)} in {1 - 1 / len(counts):.0%}"
        result["C031"] = (all(b != 0 for b in best.values()), f"best number: {numbers}{by_chance}")
    if "accuracy" in gains:
        gain = gains["accuracy"]
        rank = float(spearmanr(list(gain), list(gain.values())).statistic)
        most = max(gain)
        result["C032"] = (
            bool(gain[most] > 0 and rank > 0),
            f"{most} registers {gain[most]:+.1f} points, rank correlation {rank:.2f}",
        )
    return result


def claims(models, shares, scored, families: dict[str, list], profile: str):
    """Arguments of `Run.claim`: C029 to C032 on trained registers, the same questions of registers added at test time.

    shares: outlier share by label; scored: `tab02.table`; families: `ladders`.
    """
    one = [m.label for m in models if m.registers == 1 and m.registers_from == "trained"]
    text = "; ".join(f"{name}: {shares[name]:.2%}" for name in one)
    missing = f"no model trained with one register in profile {profile}"
    yield "C029", bool((shares[one] < 0.001).all()) if one else None, text or missing
    added = {name: members[-1].registers_from == "test time" for name, members in families.items()}
    for name, members in sorted(families.items(), key=lambda item: added[item[0]]):
        part = rows(scored, members)
        for claim, (holds, text) in by_registers(part, list(part.registers)).items():
            if added[name]:
                asked = f"{ASKED[claim]}, added to {members[0].label} at test time"
                yield f"ours-{claim}-{name}", holds, text, asked, "none"
            else:
                yield claim, holds, f"{name}: {text}"
    if all(added.values()):
        for claim in ASKED:
            yield claim, None, f"no family trained at three or more numbers of registers in profile {profile}"
    mended = [m for m in models if m.role == "mended"]
    if mended:
        names = [mended[0].base, *(m.label for m in mended)]
        numbers = {m.label: m.registers for m in models}
        text = "; ".join(f"{numbers[name]}: {shares[name]:.2%}" for name in names)
        before, after = shares[names[:2]]
        measured = f"share of outliers by registers added to {names[0]}: {text}"
        asked = "one register added at test time removes at least nine tenths of the outliers"
        yield "ours-one-added", bool(after < 0.1 * before), measured, asked, "none"
