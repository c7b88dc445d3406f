"""The page of all results: what was measured beside what the paper reports, and no damaged record stops it."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import report

from vitreg_lib import cli
from vitreg_lib.base import ROOT, UserError
from vitreg_lib.record import run as record
from vitreg_lib.record import verdicts

KEPT = ROOT / "docs" / "results" / "small"


@pytest.fixture
def made(results):
    """Two finished items of profile small, a variant of one, one cut short, and one that is being made."""
    for item in ("fig03", "where_artifacts_sit"):
        shutil.copytree(KEPT / item, results / "small" / item)
    variant = results / "small" / "fig03--12345678"
    shutil.copytree(KEPT / "fig03", variant)
    content = json.loads((variant / "record.json").read_text())
    content["parameters"] = record.declared_parameters("fig03") | {"profile": "small", "seed": 7}
    content["title"] = "A title with <angle> & ampersand"
    (variant / "record.json").write_text(json.dumps(content))
    for name, text in (("fig07", '{"half'), (".fig09.making", '{"half')):
        (results / "small" / name).mkdir()
        (results / "small" / name / "record.json").write_text(text)
    (results / "small" / "fig03" / "fig03.ipynb").write_text("{}")
    return report.write("small")


def test_the_page_shows_claims_numbers_models_parameters_and_where_from(made):
    text = made.read_text()
    kept = json.loads((KEPT / "fig03" / "record.json").read_text())
    for claim in kept["claims"]:
        assert claim["id"] in text
    for model in kept["models"]:
        assert model["sha256"] in text
    reported = [row for row in kept["measured"] if row["paper"] is not None]
    assert reported
    assert f"<td>{reported[0]['value']:.4g}</td><td>{reported[0]['paper']}</td>" in text
    assert "n_images = 100" in text
    assert f"torch {kept['environment']['torch']}" in text
    assert re.search(r"Made on \d{4}-\d\d-\d\d", text)
    own = json.loads((KEPT / "where_artifacts_sit" / "record.json").read_text())["claims"]
    paper, ours = text.index("<h2>Claims of the paper"), text.index("<h2>Claims of this collection")
    for claim in kept["claims"] + own:
        assert (paper < text.index(f"({claim['id']})") < ours) == (claim["id"] in verdicts.reported_claims())


def test_a_variant_is_named_by_what_differs_and_text_is_escaped(made):
    text = made.read_text()
    assert "fig03 with seed = 7: A title with &lt;angle&gt; &amp; ampersand" in text


def test_a_damaged_record_is_named_and_what_is_being_made_is_left_out(made):
    text = made.read_text()
    assert re.search(r"Not shown:</b> \S+record.json is damaged: run fig07 again", text)
    assert "making" not in text


def test_every_link_leads_somewhere(made):
    text = made.read_text()
    places = set(re.findall(r'id="([^"]+)"', text))
    links = set(re.findall(r'href="([^"]+)"', text))
    assert links >= {"#fig03", "#where_artifacts_sit", "#fig03--12345678", "fig03/fig03.ipynb"}
    for link in links:
        assert link[1:] in places if link.startswith("#") else (made.parent / link).exists(), link


def test_nothing_made_yet_is_said(results):
    with pytest.raises(UserError, match="nothing made yet in profile small: run `make reproduce-all PROFILE=small`"):
        report.write("small")


def test_a_damaged_record_is_one_line_in_the_terminal(made, capsys):
    assert cli.main(["report", "fig07", "--profile", "small"]) == 1
    assert re.fullmatch(r"vitreg: \S+record.json is damaged: run fig07 again\n", capsys.readouterr().err)
