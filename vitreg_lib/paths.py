"""Where the repository keeps things, all paths in one place, and how a file is written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
CHECKPOINTS = DATA / "checkpoints"
NOTEBOOKS = ROOT / "notebooks"


def results() -> Path:
    """Where results go: `VITREG_RESULTS`, else results/ of the repository."""
    return Path(os.environ.get("VITREG_RESULTS") or ROOT / "results")


def shown(path: Path) -> str:
    """A path as a reader of any machine can use it: relative to the repository where it lies inside."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, then rename; several processes may write the same at once."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
