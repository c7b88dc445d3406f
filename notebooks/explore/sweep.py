"""The numbers of a sweep (`vitreg batch`), by the swept parameter."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import seaborn
from matplotlib import pyplot as plt

from vitreg_lib.base import DATA, UserError, unknown
from vitreg_lib.plots.style import PALETTE, styled

SHIPPED = DATA / "sweeps" / "minis.parquet"


def load(path: str = "") -> pd.DataFrame:
    """The table of a sweep, by default the one in data/sweeps. Raises UserError if it cannot be read."""
    try:
        return pd.read_parquet(Path(path).expanduser() if path else SHIPPED)
    except (OSError, ValueError) as error:
        raise UserError(f"table {path!r} cannot be read; `vitreg batch sweep.yaml` writes one") from error


def values(rows: pd.DataFrame, number: str, by: str) -> pd.DataFrame:
    """(by, value) of every run in which `number` was measured. Raises UserError for another number or parameter."""
    swept = [name.removeprefix("parameter ") for name in rows.columns if name.startswith("parameter ")]
    if by not in swept:
        raise unknown("swept parameter", by, swept)
    if number not in set(rows.name):
        raise unknown("number of this sweep", number, set(rows.name))
    chosen = rows[rows.name == number]
    label = chosen[f"parameter {by}"].astype(str)
    if chosen.groupby(f"parameter {by}").model.nunique().max() > 1:
        label = label + "\n" + chosen.model
    return pd.DataFrame({by: label, "value": chosen.value.astype(float)}).dropna().reset_index(drop=True)


def spread(chosen: pd.DataFrame) -> pd.DataFrame:
    """Number of runs, mean, smallest and largest value of each group."""
    group = chosen.groupby(chosen.columns[0], sort=False).value
    return group.agg(runs="count", mean="mean", least="min", largest="max")


def explained(chosen: pd.DataFrame) -> float:
    """Share (0 to 1) of the variance over all runs that lies between the groups; NaN if all values are equal."""
    total = ((chosen.value - chosen.value.mean()) ** 2).sum()
    means = chosen.groupby(chosen.columns[0]).value.transform("mean")
    return float(1 - ((chosen.value - means) ** 2).sum() / total) if total else float("nan")


@styled
def draw(chosen: pd.DataFrame, number: str):
    """A dot for each run and a bar for the mean of each group."""
    by = chosen.columns[0]
    groups = chosen[by].nunique()
    figure, axis = plt.subplots(figsize=(max(4, 1.2 * groups + 1), 3))
    options = dict(data=chosen, x=by, y="value", ax=axis)
    seaborn.barplot(**options, errorbar=None, color=PALETTE[0], alpha=0.35)
    seaborn.stripplot(**options, jitter=False, color=PALETTE[0], size=5)
    axis.set(xlabel=by, ylabel=number)
    axis.tick_params(axis="x", rotation=20)
    return figure
