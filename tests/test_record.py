"""A run refuses what its notebook does not declare, and what it leaves is whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

import items
import pytest
import readme
import torch

from vitreg_lib.base import UserError, write_atomically
from vitreg_lib.record import run as record
from vitreg_lib.record import verdicts

ITEM = "fig03"


@pytest.fixture
def run(results):
    return record.Run(ITEM, record.check_parameters(ITEM, {}))


def some_figure():
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(1, 1))
    axis.plot([0, 1])
    plt.close(figure)
    return figure


def test_defaults_are_those_of_the_parameters_cell():
    values = record.check_parameters(ITEM, {})
    assert values["profile"] == "mini"
    assert {"models", "n_images", "seed", "cutoff"} <= values.keys()
    assert record.check_parameters(ITEM, {"seed": 3}) == values | {"seed": 3}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"n_image": 3}, "unknown parameter of fig03 'n_image': did you mean n_images"),
        ({"zzz": 3}, "unknown parameter of fig03 'zzz': known: cutoff, images"),
        ({"n_images": "many"}, "parameter n_images is 'many' (str), but an int is wanted, as in 0"),
        ({"n_images": 2.5}, "is 2.5 (float), but an int is wanted"),
        ({"n_images": -5}, "parameter n_images is -5, but at least 0 is wanted"),
        ({"seed": True}, "is True (bool), but an int is wanted"),
        ({"models": False}, "parameter models is False (bool), but a str is wanted"),
        ({"models": 3}, "unknown model '3'"),
        ({"models": "mini-diet3"}, "unknown model 'mini-diet3': did you mean mini-deit3"),
        ({"models": "mini-deit3 timm:vit_tiny_path16_224"}, "unknown model 'vit_tiny_path16_224': did you mean vit_ti"),
        ({"models": "mini-deit3+ttr99"}, "write +ttrN with N from 0 to 64"),
        ({"models": "file:nowhere.pth"}, "file:nowhere.pth: no such file"),
        ({"cutoff": "inf"}, "parameter cutoff is 'inf' (str), but a float is wanted"),
        ({"cutoff": float("nan")}, "parameter cutoff is nan"),
        ({"profile": "smal"}, "unknown profile 'smal': did you mean small"),
    ],
)
def test_bad_parameters_are_refused_with_the_nearest(given, told):
    with pytest.raises(UserError) as error:
        record.check_parameters(ITEM, given)
    assert told in str(error.value)


def test_what_papermill_passes_is_taken_where_its_meaning_is_clear():
    def checked(item, **given):
        values = record.check_parameters(item, given)
        return {name: values[name] for name in given}

    assert checked("fig03", n_images="64", cutoff="150") == {"n_images": 64, "cutoff": 150.0}
    assert checked("fig03", n_images=64.0) == {"n_images": 64}
    assert checked("fig12", registers=4, models="ti/16/224") == {"registers": "4", "models": "ti/16/224"}
    assert checked("tab03", normalize="false") == {"normalize": False}
    assert checked("fig09", layer="-1") == {"layer": -1}


def test_an_edited_parameters_cell_is_read_or_refused_in_one_line():
    assert record._assigned("n_images: int = 5\nmodels = 'a'") == {"n_images": 5, "models": "a"}
    with pytest.raises(UserError, match=r"parameter n_images = 2 \* n: write a plain number or text"):
        record._assigned("n_images = 2 * n")


def test_paths_are_resolved_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    given = items.typed("fig03", ["images=photos", "models=mini-deit3 file:w.pth+ttr2#arch"])
    assert given == {"images": f"{tmp_path}/photos", "models": f"mini-deit3 file:{tmp_path}/w.pth+ttr2#arch"}


def test_start_reads_what_a_notebook_holds(results):
    run = record.start(ITEM, {"n_images": 5, "unrelated": object(), "In": ["", "n_images = 5"]})
    assert run.parameters["n_images"] == 5
    assert run.at.n_images == 5
    assert run.at.models == record.items()[ITEM]["mini"]["models"]


def test_start_refuses_what_papermill_injects_and_the_notebook_does_not_declare(results):
    cells = ["n_images = 0", "# Parameters\nn_images = 5\nn_imagess = 3\n"]
    with pytest.raises(UserError, match="unknown parameter of fig03 'n_imagess': did you mean n_images"):
        record.start(ITEM, {"n_images": 5, "n_imagess": 3, "In": cells})
    assert not results.exists()


@pytest.mark.parametrize(
    "name", ["fig03_norm_maps", "notebooks/paper/fig03_norm_maps.ipynb", "fig3", "fig03", "figure3", "Figure03", "FIG3"]
)
def test_an_item_has_many_spellings(name):
    assert record.normal_name(name) == ITEM
    assert record.notebook(name).name == "fig03_norm_maps.ipynb"


def test_tables_and_other_names():
    assert record.normal_name("table2") == record.normal_name("tab2") == "tab02"
    assert record.normal_name("where_artifacts_sit") == "where_artifacts_sit"


def test_an_unknown_item_gives_the_nearest():
    with pytest.raises(UserError, match="unknown item 'figg03': did you mean fig03"):
        record.notebook("figg03")


def test_other_parameters_have_a_folder_of_their_own(results):
    def folder(**given):
        return record.folder(ITEM, record.check_parameters(ITEM, given))

    assert folder() == results / "mini" / "fig03"
    assert folder(profile="small") == results / "small" / "fig03"
    assert folder(seed=0) == folder()
    one = folder(seed=1, n_images=8)
    assert one.parent == results / "mini"
    assert one.name.startswith("fig03--")
    assert len(one.name) == len("fig03--") + 8
    assert one == folder(n_images=8, seed=1)
    assert one != folder(seed=1)
    assert folder(cutoff=150) == folder(cutoff=150.0)


def test_a_record_has_the_fields_of_the_design(run, results):
    run.measure("outlier_share", torch.tensor(0.25), model="m", paper=0.0237)
    run.measure("cutoff", math.inf, model="m")
    run.claim("C007", holds=True, measured="2 %")
    run.claim("own", holds=None, measured="no such model", text="ours: something", paper="none")
    run.claim("C009", holds=False, measured="one mode")
    run.save(some_figure())
    told = repr(run.claims([("C010", "undecided", "ratio 4 to 12")]))
    found = json.loads((results / "mini" / "fig03" / "record.json").read_text())
    wanted = {"item", "title", "profile", "parameters", "measured", "claims", "models", "environment", "seconds"}
    assert wanted <= found.keys()
    assert (found["item"], found["profile"]) == ("fig03", "mini")
    assert found["measured"] == [
        {"name": "outlier_share", "model": "m", "value": 0.25, "unit": "", "paper": 0.0237},
        {"name": "cutoff", "model": "m", "value": None, "unit": "", "paper": None},
    ]
    assert [c["verdict"] for c in found["claims"]] == ["holds", "not testable here", "fails", "undecided"]
    assert all(c.keys() == {"id", "text", "verdict", "measured", "paper"} for c in found["claims"])
    assert found["claims"][0]["text"] == verdicts.reported_claims()["C007"]["claim"]
    assert "FAILS" in told
    assert items.read(ITEM, run.parameters) == found
    assert str(Path.home()) not in json.dumps(found["environment"])


def test_a_verdict_is_one_of_four(run):
    with pytest.raises(ValueError, match="verdict 'maybe'"):
        run.claim("C007", "maybe", "2 %")


def test_claims_of_the_paper_and_ours_are_counted_and_shown_separately(run):
    judged = [("own <1>", True, "a < b", "ours: one", "none"), ("C007", "undecided", "2 %"), ("C009", None, "no model")]
    page = run.claims(judged)._repr_html_()
    counts = readme.tally(json.loads(run.write().read_text())["claims"])
    assert counts["paper"] == {"holds": 0, "fails": 0, "undecided": 1, "not testable here": 1}
    assert counts["ours"] == {"holds": 1, "fails": 0, "undecided": 0, "not testable here": 0}
    assert page.index("The paper") < page.index("C007") < page.index("This collection") < page.index("a &lt; b")
    assert "own &lt;1&gt;" in page and "own <1>" not in page
    for verdict in ("holds", "undecided", "not testable here"):
        colour, mark = verdicts.VERDICTS[verdict]
        assert colour in page and f"{mark} {verdict}" in page


def test_models_of_a_run_are_recorded_with_their_digest(run):
    run.settings["models"] = "mini-deit3-s random:mini-deit3-s"
    run.load()
    found = json.loads(run.write().read_text())["models"]
    assert [(m["name"], m["role"]) for m in found] == [
        ("mini-deit3-s", "trained"),
        ("random:mini-deit3-s", "random control"),
    ]
    assert all(len(m["sha256"]) == 64 for m in found)


def test_a_claim_that_the_paper_does_not_make_needs_a_text(run):
    with pytest.raises(UserError, match="unknown claim 'C9999'"):
        run.claim("C9999", True, "")


def test_missing_models_are_named_in_profile_small_and_an_error_when_asked_for(results, no_models):
    run = record.Run(ITEM, record.check_parameters(ITEM, {"profile": "small"}))
    run.settings["models"] = "mini-deit3-s clip-xs"
    assert [m.name for m in run.load()] == ["mini-deit3-s"]
    assert [m["name"] for m in run.not_here] == ["clip-xs"]
    asked = record.Run(ITEM, record.check_parameters(ITEM, {"profile": "small", "models": "clip-xs"}))
    with pytest.raises(UserError, match="clip-xs: its weights cannot be had"):
        asked.load()
    run.settings["models"] = "clip-xs dino-s"
    with pytest.raises(UserError, match="none of the models of profile small is reachable here"):
        run.load()


def test_a_record_without_its_products_is_not_taken_for_whole(run):
    def read():
        return items.read(ITEM, run.parameters)

    with pytest.raises(UserError, match="left no record.json"):
        read()
    run.write()
    with pytest.raises(UserError, match="nothing measured"):
        read()
    run.measure("x", 1)
    run.save(some_figure())
    run.write()
    assert read()["figures"] == ["figure"]
    (run.folder / "figure.png").unlink()
    with pytest.raises(UserError, match="no figure.png"):
        read()


def test_models_that_are_fed_alike_get_one_set_of_images(run):
    planted, plain, other = run.load("planted"), run.load("mini-deit3"), run.load("planted")
    other[0].mean = (0.4, 0.5, 0.6)
    first, same, normed = (run.images(m[0], 3) for m in (planted, plain, other))
    assert same is first and torch.equal(normed.pixels, first.pixels)
    assert torch.equal(normed.x, other[0].normalise(first.pixels)) and not torch.equal(normed.x, first.x)
    assert len(run.images(planted[0], 2)) == 2


def test_a_figure_that_fails_half_way_leaves_the_old_one(run):
    run.save(some_figure())
    before = {p.name: p.read_bytes() for p in run.folder.glob("figure.*")}
    assert before.keys() == {"figure.svg", "figure.png"}

    def half(path, **options):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    figure = some_figure()
    figure.savefig = half
    with pytest.raises(UserError, match="figure.svg cannot be written: disk full"):
        run.save(figure)
    assert {p.name: p.read_bytes() for p in run.folder.glob("figure.*")} == before


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_atomically(path, b"old")
    write = Path.write_bytes

    def half(self, content):
        write(self, content[: len(content) // 2])
        raise OSError("killed")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(UserError, match="record.json cannot be written: killed"):
        write_atomically(path, b"new content")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomically(path, b"new content")
    assert path.read_bytes() == b"new content"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_the_further_levels_of_a_table_are_named(run):
    import pandas as pd

    index = pd.MultiIndex.from_tuples([("a", "keys", -0.5), ("a", "values", 0.0)], names=["model", "feature", "bias"])
    run.measure_table(
        pd.DataFrame({"corloc": [0.5, float("nan")]}, index),
        {"corloc, keys, bias -0.5": 0.4},
        "{column}, {feature}, bias {bias:g}",
    )
    record = json.loads(run.write().read_text())
    found = {m["name"]: (m["model"], m["value"], m["paper"]) for m in record["measured"]}
    assert found == {"corloc, keys, bias -0.5": ("a", 0.5, 0.4), "corloc, values, bias 0": ("a", None, None)}
