"""The committed records: what they keep, what of a run is told to differ, and that `make test` fails where it does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import compare
import pytest

from vitreg_lib import cli
from vitreg_lib.base import NOTEBOOKS, ROOT
from vitreg_lib.record import run as record

ITEM = "fig03"
FAST = "fig11"  # the notebook that runs fastest


@pytest.fixture
def folder(tmp_path, monkeypatch, results):
    """An empty folder for committed records."""
    monkeypatch.setattr(compare, "FOLDER", tmp_path / "records")
    return tmp_path / "records"


def made(share=0.25, verdict=True, height=1.0, seconds=3.0, interval="0.12 to 0.34", figures=("figure",)):
    """A plain run that measured, judged and drew something; its record."""
    import matplotlib.pyplot as plt

    run = record.Run(ITEM, record.check_parameters(ITEM, {}))
    for model, value in (("mini-deit3", share), ("planted", 0.5), ("mini-random", None)):
        run.measure("outlier_share", value, model)
    run.measure(f"corloc ({interval}), layer 7", 0.2, "planted")
    run.measure("duration", seconds, unit="s")
    run.claim("C007", verdict, "2 %")
    for name in figures:
        figure, axis = plt.subplots()
        axis.bar(["a", "b", "c"], [1, 2, height])
        axis.set(title="shares")
        run.save(figure, name)
        plt.close(figure)
    return run


def kept(run):
    return json.loads(run.write().read_text())


def test_a_run_agrees_with_its_own_record(folder):
    record_now = kept(made())
    path = compare.write(record_now)
    assert path == folder / f"{ITEM}.json"
    assert compare.differences(record_now) == []
    assert "as recorded: 4 numbers and 1 figure agree with " in compare.verdict(record_now)
    assert compare.verdict(record_now).endswith(f"{ITEM}.json within 5 %")
    assert json.loads(path.read_text()) == compare.digest(record_now)
    assert "duration" not in path.read_text()
    assert [p.name for p in folder.iterdir()] == [f"{ITEM}.json"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"share": 0.252}, None),  # another processor
        ({"seconds": 99.0}, None),
        ({"interval": "0.12 to 0.35"}, None),
        ({"share": 0.29}, "outlier_share of mini-deit3 is 0.29, recorded 0.25"),
        ({"share": None}, "outlier_share of mini-deit3 is none, recorded 0.25"),
        ({"interval": "0.12 to 0.54"}, "measured 'corloc (0.12 to 0.54), layer 7' for planted"),
        ({"verdict": False}, "claim C007: fails, recorded holds"),
        ({"verdict": None}, "claim C007: not testable here, recorded holds"),
        ({"height": 1.2}, "figure, panel 1 'shares': bars 1 has"),
        ({"figures": ()}, "figure: not drawn any more"),
        ({"figures": ("figure", "figure-more")}, "figure-more: not recorded"),
    ],
)
def test_what_differs_is_told_in_words(folder, change, told):
    compare.write(kept(made()))
    differences = compare.differences(kept(made(**change)))
    assert differences == [] if told is None else any(line.startswith(told) for line in differences)


def test_a_live_training_may_end_otherwise_on_another_processor(folder):
    """Shares within ten points, and "undecided" against either answer; a claim that turns round is a difference."""
    before = kept(made(share=0.25, verdict="undecided")) | {"item": "train_clip"}
    compare.write(before)
    assert compare.differences(before) == []
    assert compare.differences(kept(made(share=0.30, verdict=True)) | {"item": "train_clip"}) == []
    percent = [kept(made(share=share, verdict="undecided")) | {"item": "train_mae"} for share in (39.4, 43.8, 50.0)]
    compare.write(percent[0])
    assert [len(compare.differences(each)) for each in percent] == [0, 0, 1]
    assert len(compare.differences(kept(made(share=0.37, verdict=False)) | {"item": "train_clip"})) == 1
    compare.write(kept(made(verdict=False)) | {"item": "train_clip"})
    assert compare.differences(kept(made(verdict=True)) | {"item": "train_clip"}) == [
        "claim C007: holds, recorded fails"
    ]


def test_a_number_or_claim_that_is_gone_or_new_is_told(folder):
    compare.write(kept(made()))
    run = made()
    run.measure("norm_ratio", 2.0, "planted")
    run._measured.pop(0)
    run._claims.clear()
    told = compare.differences(kept(run))
    assert "outlier_share of mini-deit3: measured 0 times, recorded 1 times" in told
    assert "norm_ratio of planted: measured 1 times, recorded 0 times" in told
    assert "claim C007: absent, recorded holds" in told


def test_only_a_run_with_default_parameters_is_compared(folder, capsys):
    compare.write(kept(made()))
    for given, expected in (({}, "not as recorded in "), ({"seed": 1}, "")):
        parameters = record.check_parameters(ITEM, given)
        run = record.Run(ITEM, parameters)
        run.measure("outlier_share", 0.9, "mini-deit3")
        run.write()
        capsys.readouterr()
        compare.show(ITEM, parameters)
        printed = capsys.readouterr().out
        assert printed.startswith(expected) if expected else printed == ""


def test_without_a_record_the_next_step_is_told(folder):
    assert "make refresh NOTEBOOKS=fig03" in compare.verdict(kept(made()))


def test_the_command_shows_one_line_or_the_first_differences_or_all(folder, capsys):
    def shown(*arguments):
        assert cli.main(["report", ITEM, *arguments]) == 0
        return capsys.readouterr().out

    compare.write(kept(made()))
    assert "as recorded: 4 numbers and 1 figure agree with" in shown()
    many = made(share=0.4, verdict=False, height=3.0, interval="0.5 to 0.6")
    for number in range(compare.FEW):
        many.measure(f"{'abcdefg'[number]}_new", 1.0)
    many.write()
    assert "… and " in shown()
    assert "vitreg report fig03 --differences" in shown()
    assert "… and " not in shown("--differences")


def test_every_item_has_a_small_readable_record():
    sources = {p: p.read_text() for p in NOTEBOOKS.glob("*/*.ipynb")}
    items = {found[1] for text in sources.values() if (found := re.search(r'vr\.start\(\\"(\w+)\\"', text))}
    files = {path.stem: path.read_text() for path in compare.FOLDER.glob("*.json")}
    assert files.keys() == items
    assert sum(map(len, files.values())) < 1_000_000
    for item, text in files.items():
        found = json.loads(text)
        assert found.keys() == {"item", "measured", "verdicts", "drawn"}
        assert found["item"] == item
        assert found["measured"] and found["drawn"]
        assert text == compare._readable(found) + "\n"


@pytest.mark.slow
def test_a_notebook_whose_number_was_altered_in_the_record_fails_and_a_refresh_mends_it(tmp_path):
    """As `make test` and `make refresh` run it, in a copy of the repository."""
    for part in ("vitreg_lib", "workflow", "data", "notebooks"):
        ignore = shutil.ignore_patterns("__pycache__", "eval.parquet", ".*")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignore)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "VITREG_BATCH": "1"}
    environment["VITREG_RESULTS"] = str(tmp_path / "results")
    notebook = str(record.notebook(FAST).relative_to(ROOT))
    path = tmp_path / "data" / "records" / f"{FAST}.json"

    def run(*command):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        return done.returncode, done.stdout + done.stderr

    def tested():
        flags = ["--nbval-current-env", "--nbval-kernel-startup-timeout", "180", "-p", "no:cacheprovider"]
        return run("-m", "pytest", "-q", "-n", "0", "--nbval", *flags, notebook)

    code, told = tested()
    assert code == 0, told
    before = json.loads(path.read_text())
    name, model, value = before["measured"][0]
    altered = before | {"measured": [[name, model, 2 * value], *before["measured"][1:]]}
    path.write_text(json.dumps(altered))
    code, told = tested()
    assert code == 1
    assert f"not as recorded in data/records/{FAST}.json" in told
    assert f"{name} of {model} is {value:.4g}, recorded {2 * value:.4g}" in told
    code, told = run("workflow/refresh.py", FAST)
    assert code == 0, told
    assert json.loads(path.read_text()) == before
