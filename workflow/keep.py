"""`make keep PROFILE=small`: copy the records and PNG figures of finished items to docs/results/, to be committed.

All of them must come from the same commit, which the records name, without uncommitted changes.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from vitreg_lib.base import ROOT, UserError, commit, results

KEPT = ROOT / "docs" / "results"


def finished(profile: str) -> dict[Path, dict]:
    """{folder: record} of the items in results/<profile>/ that ran with their default parameters.

    Raises UserError if files differ from the commit, if there are no results, or if they are not from one clean commit.
    """
    if commit().endswith("+"):
        raise UserError("files differ from the last commit: commit or undo the changes (`git status` names them)")
    paths = sorted((results() / profile).glob("[!.]*/record.json"))
    records = {path.parent: json.loads(path.read_text()) for path in paths if "--" not in path.parent.name}
    if not records:
        raise UserError(f"no results of profile {profile}: `make reproduce-all PROFILE={profile}` makes them")
    made = {}
    for folder, record in records.items():
        made.setdefault(record["environment"].get("commit") or "no commit", []).append(folder.name)
    if len(made) > 1 or not next(iter(made)).isalnum():  # "no commit", or a commit with "+" for changed files
        which = "; ".join(f"{name}: {', '.join(items)}" for name, items in made.items())
        raise UserError(f"the records are not from one commit without changes: run the items again ({which})")
    return records


def main(profile: str) -> None:
    """Copy the records and figures; print their folders, and the folders that are left from earlier."""
    records = finished(profile)
    for folder, record in records.items():
        target = KEPT / profile / folder.name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in ("record.json", *(f"{figure}.png" for figure in record["figures"])):
            shutil.copy(folder / name, target)
        print(f"docs/results/{profile}/{folder.name}")
    if earlier := sorted({path.name for path in (KEPT / profile).iterdir()} - {folder.name for folder in records}):
        print(f"from earlier, not made again: {', '.join(earlier)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except UserError as error:
        sys.exit(f"keep: {error}")
