"""The paper's claims, and the verdicts on them as text and as a table."""

import csv
import functools

from ..base import DATA
from .page import PAGES, page

VERDICTS = {  # colour and mark, safe for colour-blind readers and legible without colour
    "holds": ("#0072B2", "✓"),
    "fails": ("#D55E00", "✗"),
    "undecided": ("#E69F00", "~"),
    "not testable here": ("#8A8A8A", "–"),
}


@functools.cache
def reported_claims() -> dict[str, dict]:
    """The paper's claims by id, from data/reported/claims.csv."""
    with open(DATA / "reported" / "claims.csv", newline="") as f:
        return {row["id"]: row for row in csv.DictReader(f)}


class Verdicts:
    """The judged claims of a record, as text and as a page's table: the paper's first, then this collection's own."""

    def __init__(self, claims: list[dict]):
        known, titles = reported_claims(), {"The paper's claims": True, "This collection's own": False}
        self.parts = {title: [c for c in claims if (c["id"] in known) == paper] for title, paper in titles.items()}

    def __repr__(self) -> str:
        rows = []
        for claim in [c for part in self.parts.values() for c in part]:
            verdict = claim["verdict"].upper() if claim["verdict"] == "fails" else claim["verdict"]
            rows.append(f"{claim['id']} {verdict}: {claim['text']}")
            paper = f"   paper: {claim['paper']}" if claim["paper"] not in ("", "none") else ""
            rows.append(f"     measured: {claim['measured']}{paper}")
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        return page(PAGES / "verdicts.html", parts=self.parts, verdicts=VERDICTS)
