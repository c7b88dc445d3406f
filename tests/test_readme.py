"""README.md and docs/models.md agree with the records and with data/models.yaml; every link leads somewhere."""

from __future__ import annotations

import json
import re
import sys

import pytest

from vitreg_lib.base import ROOT

sys.path.insert(0, str(ROOT / "workflow"))
import readme  # noqa: E402

NOTEBOOKS = [p for p in sorted((ROOT / "notebooks").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", list(readme.PAGES), ids=lambda path: path.name)
def test_tables_are_those_of_the_records(path):
    assert path.read_text() == readme.filled(path), "run `python workflow/readme.py`"


def test_an_item_is_counted_as_its_record_says():
    record = json.loads((ROOT / "data" / "records" / "fig12.json").read_text())
    verdicts = dict(record["verdicts"])
    assert readme.counts("fig12", "mini")["paper"]["holds"] == sum(
        verdict == "holds" for claim, verdict in verdicts.items() if re.fullmatch(r"C\d{3}", claim)
    )
    assert sum(sum(side.values()) for side in readme.counts("fig12", "mini").values()) == len(verdicts)


def test_every_item_has_a_row():
    rows = readme.table().splitlines()[2:]
    assert len(rows) == 27 and all(row.count("|") == 5 for row in rows)


@pytest.mark.parametrize("path", [*DOCUMENTS, *NOTEBOOKS], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_no_page_calls_deit_ti_clean():
    for path in [*DOCUMENTS, ROOT / "data" / "models.yaml", *NOTEBOOKS]:
        text = path.read_text().lower()
        assert not re.search(r"deit-ti[^.;|\n]{0,60}\b(has none|have none|is clean|no artifacts)", text), path.name
