"""`python workflow/readme.py`: write the tables of README.md and docs/models.md, from records and data/models.yaml.

Each table is between two comments, `<!-- NAME -->` and `<!-- end -->`; do not edit the lines between them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from vitreg_lib.base import NOTEBOOKS, ROOT
from vitreg_lib.model import zoo
from vitreg_lib.record import run as record
from vitreg_lib.record.verdicts import VERDICTS, reported_claims

RECORDS, SMALL = ROOT / "data" / "records", ROOT / "docs" / "results" / "small"
NOT_RESULTS = {"file", "about", "sha256", "command", "steps", "images", "parameters", "seconds_of_last_session"}
NOT_RESULTS |= {"family", "base", "registers", "registers_from", "head", "trained", "input_size"}


def counts(item: str, profile: str) -> dict[str, dict[str, int]] | None:
    """`tally` of an item's committed record, for the profile "mini" or "small"; None without a record."""
    path = RECORDS / f"{item}.json" if profile == "mini" else SMALL / item / "record.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    claims = found["claims"] if profile == "small" else [{"id": i, "verdict": v} for i, v in found["verdicts"]]
    return tally(claims)


def tally(claims: list[dict]) -> dict[str, dict[str, int]]:
    """{"paper", "ours": {verdict: number of claims}} of a record: the paper's claims and our own."""
    numbers = {side: dict.fromkeys(VERDICTS, 0) for side in ("paper", "ours")}
    for claim in claims:
        numbers["paper" if claim["id"] in reported_claims() else "ours"][claim["verdict"]] += 1
    return numbers


def items() -> list[str]:
    """Figures and tables of the paper, in order."""
    return sorted(name for name in record.items() if re.fullmatch(r"(fig|tab)\d\d", name))


def in_words(numbers: dict[str, int] | None) -> str:
    """The counts of the four verdicts in one line, in the order of `VERDICTS`."""
    return " · ".join(map(str, numbers.values())) if numbers else "–"


def table() -> str:
    """One row an item: its number, its title with a link, counts of the paper's claims by verdict for both profiles."""
    rows = ["| | what it shows | mini models | real small models |", "|---|---|---|---|"]
    for item in items():
        path = next(NOTEBOOKS.glob(f"paper/{item}_*.ipynb")).relative_to(ROOT).as_posix()
        name = f"{'Figure' if item.startswith('fig') else 'Table'} {int(item[3:])}"
        mini, small = (found and found["paper"] for found in (counts(item, p) for p in ("mini", "small")))
        beside = f"[{in_words(small)}](docs/results/small/{item})" if small else "–"
        rows.append(f"| [{name}]({path}) | {record.items()[item]['title']} | {in_words(mini)} | {beside} |")
    return "\n".join(rows)


def totals() -> str:
    """Counts over all items with a record, of the paper's claims and of our own, for both profiles."""
    titles = {"paper": "claims of the paper", "ours": "claims of our own (controls, baselines)"}
    rows = ["| | " + " | ".join(VERDICTS) + " |", "|---|" + "---|" * len(VERDICTS)]
    for profile, models in (("mini", "mini models"), ("small", "real small models")):
        found = [c for item in record.items() if (c := counts(item, profile))]
        for side, title in titles.items():
            numbers = [sum(each[side][verdict] for each in found) for verdict in VERDICTS]
            rows.append(f"| {models}: {sum(numbers)} {title} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(rows)


def models() -> str:
    """One row a trained model of the repository: description, parameters, training steps, results on unseen images."""
    rows = [
        "| model | what it is | parameters | steps | measured on images not used in training |",
        "|---|---|---|---|---|",
    ]
    for name, entry in sorted(zoo.entries().items()):
        if "steps" in entry:
            results = {k: v for k, v in entry.items() if k not in NOT_RESULTS and isinstance(v, float | int)}
            text = ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in results.items())
            rows.append(f"| `{name}` | {entry['about']} | {entry['parameters']:,} | {entry['steps']} | {text} |")
    return "\n".join(rows)


PAGES = {ROOT / "README.md": {"items": table, "totals": totals}, ROOT / "docs" / "models.md": {"models": models}}


def filled(path: Path) -> str:
    """The text of a page with new tables. Raises ValueError if the place of a table is missing."""
    text = path.read_text()
    for name, make in PAGES[path].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        if not re.search(pattern, text, re.S):
            raise ValueError(f"{path.name} has no place <!-- {name} --> … <!-- end -->")
        text = re.sub(pattern, lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page))
        print(page.relative_to(ROOT))
