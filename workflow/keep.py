"""`make keep PROFILE=small`: put the records and PNG figures of finished items under docs/results/, to be committed."""

from __future__ import annotations

import json
import shutil
import sys

from vitreg_lib.base import ROOT, results


def main(profile: str) -> None:
    """Copy what results/<profile>/ holds for items with their default parameters."""
    for record in sorted((results() / profile).glob("[!.]*/record.json")):
        if "--" in record.parent.name:
            continue
        target = ROOT / "docs" / "results" / profile / record.parent.name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        shutil.copy(record, target)
        for figure in json.loads(record.read_text())["figures"]:
            shutil.copy(record.parent / f"{figure}.png", target)
        print(target.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1])
