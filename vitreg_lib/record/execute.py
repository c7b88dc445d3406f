"""Run an item's notebook by papermill, so that its results are whole or those of the run before."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from ..base import UserError, enter_batch, shown
from . import run as record


def execute(item: str, given: dict, progress: bool = True) -> Path:
    """Run an item's notebook by papermill into its results folder; the executed notebook's path.

    It is written under a temporary name and renamed when all went well; a failed one is kept as *.failed.ipynb.
    Raises UserError when a cell fails, or when the record or a figure is missing afterwards.
    """
    import papermill
    from traitlets.config import Config

    parameters = record.check_parameters(item, given)
    folder = record.folder(item, parameters)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished, finished = folder / f".{item}.ipynb", folder / f"{item}.ipynb"
    failed = folder / f"{item}.failed.ipynb"
    for earlier in (folder / "record.json", finished, failed):
        earlier.unlink(missing_ok=True)
    enter_batch()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="vitreg-") as sockets:
        # sockets in a folder of their own: kernels started at the same time cannot race for ports
        transport = {"transport": "ipc", "ip": f"{sockets}/kernel"} if os.name == "posix" else {}
        try:
            papermill.execute_notebook(
                str(record.notebook(item)),
                str(unfinished),
                parameters=given,
                kernel_name="python3",
                progress_bar=progress,
                start_timeout=180,
                cwd=str(record.notebook(item).parent),  # as JupyterLab and nbval do
                config=Config(KernelManager=transport),
            )
            record.read(item, parameters)
        except BaseException as error:
            (folder / "record.json").unlink(missing_ok=True)
            if unfinished.exists():
                unfinished.replace(failed)
            if not isinstance(error, papermill.PapermillExecutionError):
                raise
            line = f"{error.evalue}" if error.ename == "UserError" else f"{error.ename}: {error.evalue}"
            raise UserError(f"{item}: {line.splitlines()[0]} (cell {error.exec_count}; see {shown(failed)})") from error
        finally:
            unfinished.with_suffix(".tmp").unlink(missing_ok=True)
    return unfinished.replace(finished)
