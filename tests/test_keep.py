"""What `make keep` puts under docs/results/ comes from one commit, and from no changed file."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vitreg_lib import base
from vitreg_lib.base import ROOT, UserError
from vitreg_lib.record import run

sys.path.insert(0, str(ROOT / "workflow"))
import keep  # noqa: E402


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one committed file, which stands for this one; a function that runs git in it."""
    place = tmp_path / "repository"
    place.mkdir()

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(command, cwd=place, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (place / "code.py").write_text("1\n")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(base, "ROOT", place)
    monkeypatch.setattr(keep, "KEPT", place / "docs" / "results")
    return place, git


def a_result(results, item: str, commit: str) -> None:
    folder = results / "small" / item
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figure.png").write_bytes(item.encode())
    (folder / "record.json").write_text(json.dumps({"figures": ["figure"], "environment": {"commit": commit}}))


def test_a_record_names_the_commit_and_whether_files_differ_from_it(repository):
    place, git = repository
    assert run.environment()["commit"] == git("rev-parse", "--short=12", "HEAD")
    (place / "README.md").write_text("what is written about the code does not count")
    git("add", ".")
    assert run.environment()["commit"] == git("rev-parse", "--short=12", "HEAD")
    (place / "code.py").write_text("2\n")
    assert run.environment()["commit"] == git("rev-parse", "--short=12", "HEAD") + "+"


def test_results_of_one_clean_commit_are_kept(repository, results, capsys):
    place, _ = repository
    for item in ("fig03", "tab01", "tab01--0a1b2c3d"):
        a_result(results, item, "0123456789ab")
    keep.main("small")
    kept = sorted(path.relative_to(place / "docs" / "results").as_posix() for path in place.glob("docs/*/*/*/*"))
    assert kept == [f"small/{item}/{name}" for item in ("fig03", "tab01") for name in ("figure.png", "record.json")]
    (place / "docs" / "results" / "small" / "tab06").mkdir()
    keep.main("small")  # what it wrote itself is no change of the code
    assert "from earlier, not made again: tab06" in capsys.readouterr().out


def test_a_changed_file_is_refused_in_one_line(repository, results):
    place, _ = repository
    a_result(results, "fig03", "0123456789ab")
    (place / "code.py").write_text("2\n")
    with pytest.raises(UserError, match="differ from the last commit") as refused:
        keep.main("small")
    assert "\n" not in str(refused.value) and not (place / "docs").exists()


@pytest.mark.parametrize("other", ["ba9876543210", "0123456789ab+", ""])
def test_results_of_several_commits_or_of_changed_files_are_refused(repository, results, other):
    place, _ = repository
    a_result(results, "fig03", "0123456789ab")
    a_result(results, "tab01", other)
    with pytest.raises(UserError, match=r"not from one commit without changes.*0123456789ab: fig03.*tab01") as refused:
        keep.main("small")
    assert "\n" not in str(refused.value) and not (place / "docs").exists()
