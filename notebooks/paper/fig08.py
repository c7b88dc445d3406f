"""Figure 8: scores by the number of registers, their plot, and the verdicts."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from tab02 import LOWER_IS_BETTER, PANELS, SCORE
from verdicts import above, every, over_images

from vitreg_lib.measure.pairs import TRAINED, interval, pairs
from vitreg_lib.plots.style import PALETTE, PAPER, styled

LEVEL = 0.05  # p-values below this decide
DENSE = {"miou": "masks", "rmse": "depth"}

ASKED = {  # the claims of Figure 8 in our words
    "C030": "one register brings more than half of the best gain in masks and in depth",
    "C031": "the best number of registers is not 0 for masks nor for depth",
    "C032": "the class gains with more registers",
}


@styled
def scores_by_registers(ladders: dict) -> Figure:
    """Figure 8, lower part: the change of the three scores from the model without registers, by the number of them.

    One line a ladder (one model with several numbers of registers); bars: spread of each score over seeds. ladders:
    {name: DataFrame of `tab02.table` with a column registers, the first row without}.
    """
    tasks = [task for task in PANELS if any(task in table for table in ladders.values())]
    counts = sorted({int(c) for table in ladders.values() for c in table.registers})
    figure, axes = plt.subplots(1, len(tasks), figsize=(2.6 * len(tasks) + 0.2, 2.7), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        label, factor = PANELS[task]
        for number, (name, table) in enumerate(ladders.items()):
            x = np.array([counts.index(int(c)) for c in table.registers]) + 0.06 * (number - (len(ladders) - 1) / 2)
            spread = factor * table[f"{task}_sd"]
            change = factor * (table[task] - table[task].iloc[0])
            axis.errorbar(x, change, spread, marker="o", ms=4, lw=1.2, color=PALETTE[number], label=name)
        axis.axhline(0, color=PAPER, lw=0.8, zorder=0)
        axis.set_xticks(range(len(counts)), counts)
        better = "lower is better" if task in LOWER_IS_BETTER else "points"
        axis.set(xlabel="registers", ylabel=f"change of {label.removesuffix(' (%)')}\n({better})")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def ladders(models) -> dict[str, list]:
    """{name: models of a ladder, by number of registers, from none}.

    A ladder is a model without registers and at least two versions with registers of the same origin. Its name has the
    base model and the origin: "mini-dinov2-reg" (trained with registers), "vit-ti+ttr" (added at test time).
    """
    plain, result = {model.label: model for model in models}, {}
    for base, origin in dict.fromkeys((m.base, m.registers_from) for m in models if m.base in plain):
        members = [m for m in models if m.base == base and m.registers_from == origin]
        if len(members) >= 2:
            ending = {"trained": "-reg", "fine-tuned": "-trained-reg", "test time": "+ttr"}
            name = base + ending.get(origin, f", {origin}")
            result[name] = [plain[base], *sorted(members, key=lambda model: model.registers)]
    return result


def rows(table, members):
    """The rows of one ladder's models in a table indexed by label, with an additional column registers."""
    return table.loc[[m.label for m in members]].assign(registers=[m.registers for m in members])


def claims(models, outliers: dict, having, found: dict, ladders: dict, profile: str):
    """Yields the arguments of `Run.claim`: C029 on artifacts, C030 to C032 on the first trained ladder, then ours.

    A ladder is judged only if its model without registers has artifacts. outliers: {label: `Outliers`}; having: labels
    of the models with artifacts; found: {label: `tab02.Scores`}.
    """
    base = pairs(models)
    one = [m.label for m in models if m.registers == 1 and m.registers_from in TRAINED]
    judged = [name for name in one if base.get(name) in having]
    shares = {name: over_images(each.mask) for name, each in outliers.items()}
    text = "; ".join(f"{name}: {shares[name]}" for name in judged or one)
    missing = f"no artifacts without registers ({text})" if one else f"no model with one register in profile {profile}"
    yield "C029", every(shares[name].below() for name in judged), text if judged else missing
    having_ladders = {n: members for n, members in ladders.items() if members[0].label in having}
    trained = next((n for n, members in having_ladders.items() if members[-1].registers_from in TRAINED), None)
    if trained is None:
        for claim in ("C030", "C031", "C032"):
            yield (
                claim,
                None,
                f"no model with artifacts and three or more numbers of trained registers in profile {profile}",
            )
    for name, members in sorted(ladders.items(), key=lambda item: item[0] != trained):
        for claim, (holds, measured) in by_registers(found, members).items():
            if name == trained:
                yield claim, holds, f"{name}: {measured}"
            else:
                text = measured if name in having_ladders else f"{members[0].label} has no artifacts ({measured})"
                holds = holds if name in having_ladders else None
                yield f"ours-{claim}-{name}", holds, text, f"{ASKED[claim]} ({name})", "none"
    mended = [m for m in models if m.role == "mended"]
    if mended:
        plain, one = base[mended[0].label], mended[0].label
        before, after = (outliers[name].mask.flatten(1).double().mean(1) for name in (plain, one))
        low, high = interval(after - 0.1 * before)
        text = "; ".join(f"{m.registers}: {shares[m.label]}" for m in mended)
        text = f"share of outliers of {plain} {shares[plain]}; by the number of registers added {text}"
        holds = above(-high, -low) if plain in having else None
        claim = "one register added at test time removes at least nine tenths of the outliers"
        yield "ours-one-added", holds, text, claim, "none"


def by_registers(found: dict, members, draws: int = 500, seed: int = 0) -> dict[str, tuple[bool | str | None, str]]:
    """{"C030", "C031", "C032": (verdict, measured text)}: the claims of Figure 8 about the three tasks.

    found: {label: `tab02.Scores`}; members: the models of one ladder, the first without registers. C031: the largest
    gains of masks and of depth are larger than by chance. C030: then one register brings more than half of each gain.
    C032: the classification improves with the number of registers. Chance is simulated: the scores of each image are
    shuffled among the models. This removes any difference between models but keeps the choice of the best. 5 % of the
    shuffles pass a test. The verdicts are about these trained models, one for each number of registers.
    """
    counts = [model.registers for model in members]
    scored = {
        task: torch.stack([found[m.label].parts[task] for m in members]) for task in found[members[0].label].parts
    }
    missing = "no score of this kind was measured"
    result, first = {claim: (None, missing) for claim in ASKED}, {}
    best = {task: _best_gain(scored[task], task, draws, seed) for task in DENSE if task in scored}
    lacking = "".join(f"{name} not measured; " for task, name in DENSE.items() if task not in scored)
    if best:
        text = "; ".join(_said(task, counts, gains, p_up) for task, (gains, p_up, _) in best.items())
        gained = every(p_up < LEVEL or (False if p_down < LEVEL else "undecided") for _, p_up, p_down in best.values())
        holds = None if gained is True and lacking else gained  # one of two tasks cannot confirm a claim about both
        seeds = scored[next(iter(best))].shape[1]
        how = f"{seeds} seeds, {draws} shuffles of the models"
        result["C031"] = (holds, f"{lacking}{text} ({how}; a rule that only asks for the best number passes by chance "
                                 f"in {1 - 1 / len(counts):.0%})")  # fmt: skip
        for task, (gains, *_) in best.items():
            if 1 in counts:
                low, high = _half_gain(scored[task], task, counts.index(1), int(gains.argmax()), draws, seed)
                first[task] = (
                    above(low, high),
                    f"{task}: gain of 1 register minus half of the best {_span(task, low, high)}",
                )
        if gained is not True:
            open_ = "undecided" if gained == "undecided" else None  # a loss has no half of a gain
            both = " and ".join(DENSE[task] for task in best)
            result["C030"] = (open_, f"{lacking}no gain of {both} beyond chance to take the share of; {text}")
        elif not first:
            result["C030"] = (None, "no model with one register")
        else:
            holds = every(v for v, _ in first.values())
            holds = None if holds is True and lacking else holds
            result["C030"] = (holds, lacking + "; ".join(t for _, t in first.values()))
    if "accuracy" in scored:
        trend, p_up, p_down = _trend(scored["accuracy"], draws, seed)
        holds = True if p_up < LEVEL else False if p_down < LEVEL else "undecided"
        gain = 100 * _gains(scored["accuracy"], "accuracy")[-1]
        text = (
            f"{counts[-1]} registers {gain:+.1f} points, {100 * trend:+.2f} from one number to the next (p {p_up:.2g})"
        )
        result["C032"] = (holds, text)
    return result


def _gains(parts: torch.Tensor, task: str) -> torch.Tensor:
    """(models,) mean score over seeds minus that of the first model; larger is better. parts: (models, seeds, …)."""
    score = SCORE[task](parts).mean(1)
    return (score - score[0]) * (-1 if task in LOWER_IS_BETTER else 1)


def _shuffles(parts: torch.Tensor, draws: int, seed: int):
    """Yields `draws` copies of parts (models, seeds, images, values), each image's scores shuffled among the models."""
    generator, images = torch.Generator().manual_seed(seed), torch.arange(parts.shape[2])
    for _ in range(draws):
        order = torch.rand(len(parts), len(images), generator=generator).argsort(0)
        yield parts[order[:, None, :], torch.arange(parts.shape[1])[None, :, None], images]


def _p(value: float, null: list[float]) -> float:
    return (1 + sum(n >= value - 1e-12 for n in null)) / (1 + len(null))


def _best_gain(parts, task: str, draws: int, seed: int) -> tuple[torch.Tensor, float, float]:
    """(gains (models,), p-value of the largest gain, p-value of all numbers of registers above 0 being worse)."""
    gains = _gains(parts, task)
    null = [_gains(drawn, task)[1:].max().item() for drawn in _shuffles(parts, draws, seed)]
    return gains, _p(gains[1:].max().item(), null), _p(-gains[1:].max().item(), [-n for n in null])


def _half_gain(parts, task: str, one: int, best: int, draws: int, seed: int) -> tuple[float, float]:
    """The middle 95 % of the gain of one register minus half of the best gain, by a bootstrap over images."""
    generator, images = torch.Generator().manual_seed(seed), parts.shape[2]
    drawn = []
    for _ in range(draws):
        gains = _gains(parts[:, :, torch.randint(images, (images,), generator=generator)], task)
        drawn.append((gains[one] - gains[best] / 2).item())
    low, high = torch.tensor(drawn).double().quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return low, high


def _trend(parts, draws: int, seed: int) -> tuple[float, float, float]:
    """(slope of the accuracy over the rank of the number of registers, p-value of a rise, p-value of a fall).

    The slope, not the rank correlation: four numbers are often in order by chance.
    """

    def slope(values):
        score, rank = SCORE["accuracy"](values).mean(1), torch.arange(float(len(values))).double()
        rank = rank - rank.mean()
        return ((score * rank).sum() / rank.square().sum()).item()

    value, null = slope(parts), [slope(drawn) for drawn in _shuffles(parts, draws, seed)]
    return value, _p(value, null), _p(-value, [-n for n in null])


def _span(task: str, low: float, high: float) -> str:
    factor, unit = (1, "") if task in LOWER_IS_BETTER else (100, " points")
    return f"{factor * low:+.2f} to {factor * high:+.2f}{unit}"


def _said(task: str, counts: list[int], gains: torch.Tensor, p_up: float) -> str:
    best, factor = 1 + int(gains[1:].argmax()), 1 if task in LOWER_IS_BETTER else 100
    unit = "" if task in LOWER_IS_BETTER else " points"
    return f"{task}: best gain {factor * gains[best]:+.2f}{unit} with {counts[best]} (p {p_up:.2g})"
