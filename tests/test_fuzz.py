"""Odd values for every notebook's parameters: a result, or one line that says what is wanted."""

from __future__ import annotations

import json
import traceback
from pathlib import Path

import items
import pytest

from vitreg_lib.base import NOTEBOOKS, ROOT, UserError
from vitreg_lib.record import run as record

ODD = {
    str: ["", "no-such-thing", "inf", "x" * 1000, 4, -1, 1.5, True, None, ["planted"], float("inf")],
    int: [-1, 0, 10**9, 1.5, "12", "many", "", True, None, float("inf"), float("nan"), [4]],
    float: [-1e9, 3, "0.1", "x", "", True, None, float("inf"), float("nan"), {}],
    bool: ["yes", "True", 0, 2, None, ""],
}
ITEMS = sorted(
    path.stem.split("_")[0] if path.parent.name == "paper" else path.stem
    for path in NOTEBOOKS.glob("*/*.ipynb")
    if path.parent.name != "workshop"
)


@pytest.mark.parametrize("item", ITEMS)
def test_an_odd_value_is_taken_as_the_declared_type_or_refused_in_one_line(item):
    refused = taken = 0
    for name, default in record.declared_parameters(item).items():
        for value in ODD[type(default)]:
            try:
                checked = record.check_parameters(item, {name: value})
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
                assert any(word in str(error) for word in (name, "unknown model", "unknown profile")), str(error)
            else:
                taken += 1
                assert type(checked[name]) is type(default), (name, value)
                assert checked[name] == value or str(value) == str(checked[name]) or float(value) == checked[name]
    assert refused > taken / 4
    assert taken


# values that fit the type, of the notebooks that once failed away from their defaults
CASES = {
    "fig11": [
        *({"grid_in": size, "grid_out": out} for size in (1, 3, 4, 5, 37) for out in (1, 16, 40)),
        *({"offset": value} for value in (0.0, -0.1, 1.0, 5.5, -6.5, -7.0, -100.0, 1e6)),
    ],
    "fig12": [
        *({"models": text} for text in ("", "ti/16/224", "ti/16", "xx/16/224", "ti/15/224", "ti/16/8", "ti/0/8")),
        *({"models": "ti/16/64", "registers": text} for text in ("", "0", "4", "4 0", "0 0", "-1 2", "many", "0 100")),
        *({"models": "ti/16/64", "measured": text} for text in ("ti 16", "xx 16 64", "ti 16 many")),
    ],
    "tab05": [
        {"models": "planted"},
        {"models": "planted planted+ttr4", "max_tokens": 1},
        {"models": "planted+ttr4 planted"},
        {"models": "mini-random", "n_images": 1},
        {"models": "planted planted", "n_images": 2},
    ],
    "where_artifacts_sit": [
        {"models": "mini-random"},
        {"models": "planted", "n_images": 1},
        {"models": "planted", "n_images": 2},
        {"models": "planted", "count": 0},
        {"models": "planted", "count": 1},
        {"models": "planted", "count": 10**6},
        {"models": "planted mini-random"},
    ],
    "fig16": [
        {"models": "mini-random"},
        {"models": "planted", "layer": 99},
        {"models": "planted", "layer": 0, "n_images": 1},
        {"models": "planted planted", "n_images": 2},
        {"models": "mini-dinov2-reg4", "layer": -9},
        {"models": "mini-deit3-reg4+ttr64"},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("item", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_notebook_away_from_its_defaults_gives_a_result_or_one_line(item, results, monkeypatch, capsys):
    import matplotlib.pyplot as plt

    monkeypatch.setenv("VITREG_BATCH", "1")
    monkeypatch.chdir(record.notebook(item).parent)
    made, failed = 0, []
    for given in CASES[item]:
        few = {"n_images": 8} if "n_images" in record.declared_parameters(item) else {}
        try:
            play(item, few | given)
            made += 1
        except Exception as error:
            if is_deliberate(error):
                assert "\n" not in str(error)
                continue
            failed.append(f"{given}: {type(error).__name__}: {error}".splitlines()[0][:200])
        plt.close("all")
    assert not failed, "\n".join(failed)
    assert made, "no case gave a result"


def is_deliberate(error: Exception) -> bool:
    """Whether this project's own code raised it as what a user can mend: not a KeyError, not from inside a library."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    own = any(raised_in.is_relative_to(folder) for folder in (ROOT / "vitreg_lib", NOTEBOOKS))
    return isinstance(error, UserError) or (type(error) is ValueError and own)


def play(item: str, given: dict) -> None:
    """Run the code of a notebook in this process, with parameters; raises what a cell raises."""
    namespace = {"__name__": "__main__"}
    for cell in json.loads(record.notebook(item).read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
        if "parameters" in cell["metadata"].get("tags", ()):
            namespace |= given
    items.read(item, record.check_parameters(item, given))
