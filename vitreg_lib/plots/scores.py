"""Figures of probes and scores by group of tokens: densities, dots by group and fit, scores with their intervals."""

import re

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .style import PALETTE, PAPER, styled, wrapped


def dots(axis, table, value: str, place: str, kind: str, styles: dict[str, tuple], **options) -> None:
    """Draw one dot with its interval per row of `table`, at its `place`, dodged by its `kind`.

    table: DataFrame with columns `value`, low, high, `place` and `kind`; a dot with NaN as low and high has no
    interval. styles: {kind: (colour, marker)}. options: of seaborn's `pointplot`; orient="h" puts places on the y axis.
    """
    import seaborn as sns

    # seaborn computes the interval from samples: low, value and high have the median `value` and the range (low, high)
    ends = table.melt([place, kind], [value, "low", "high"], var_name="end", value_name="_score")
    across = options.pop("orient", "v") == "v"
    options = {"dodge": 0.16 * (len(styles) - 1), "linestyle": "none", "markersize": 4.5, "legend": False} | options
    sns.pointplot(
        ends,
        x=place if across else "_score",
        y="_score" if across else place,
        hue=kind,
        hue_order=list(styles),
        palette=[colour for colour, _ in styles.values()],
        markers=[marker for _, marker in styles.values()],
        estimator="median",
        errorbar=("pi", 100),
        err_kws={"linewidth": 1.2},
        orient="v" if across else "h",
        ax=axis,
        **options,
    )
    axis.set(xlabel="", ylabel="")


@styled
def scores(table, label: str, lines: dict[str, float]) -> Figure:
    """Scores with intervals: one group of dots per model, one colour per setting; `lines` are named baselines.

    table: DataFrame indexed by (model, setting) with columns value, low, high.
    """
    rows = table.rename_axis(["model", "setting"]).reset_index()
    models, settings = rows.model.unique(), rows.setting.unique()
    figure, axis = plt.subplots(figsize=(max(4.5, 1.25 * len(models) + 1.2), 3.2))
    styles = {setting: (PALETTE[n], "oDs^"[n % 4]) for n, setting in enumerate(settings)}
    dots(axis, rows, "value", "model", "setting", styles, legend="full")
    for style, (name, value) in zip(("--", ":", "-."), lines.items(), strict=False):
        axis.axhline(value, color=PAPER, ls=style, lw=1, label=f"{name}: {value:.0f}")
    axis.set_xticks(range(len(models)), ["\n".join(map(wrapped, re.split(r"(?=\+)|(?<=:)", name))) for name in models])
    axis.set(ylabel=label, xlim=(-0.6, len(models) - 0.4), ylim=(min(0, axis.get_ylim()[0]), None))
    axis.get_legend().remove()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
