"""Run an item's notebook by papermill, so that its results are always complete: those of this run or of the one before.

The notebook writes into a folder beside its results, `.ITEM.making`. When all products exist, this folder replaces the
earlier results; a run that fails or is killed does not change them. A lock on the item's folder allows one process at a
time. The system releases the lock of a process that dies.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import items

from vitreg_lib.base import UserError, shown, write_atomically
from vitreg_lib.record import run as record

SOCKET_LENGTH = 80  # longest path of a folder for sockets: a socket's whole path has at most 107 characters


def execute(item: str, given: dict, progress: bool = True) -> Path:
    """The path of the executed notebook, after papermill has run it into the item's results folder.

    A notebook that fails is saved in the folder of the earlier results as *.failed.ipynb. Raises UserError if a cell
    fails, the kernel dies, or the record or a figure is missing afterwards.
    """
    parameters = record.check_parameters(item, given)
    items.enter_batch()
    folder = record.folder(item, parameters)
    with locked(folder, item):
        _recover(folder)
        making = folder.with_name(f".{folder.name}.making")
        shutil.rmtree(making, ignore_errors=True)  # of a run that was killed
        making.mkdir(parents=True)
        try:
            with kernel_folder() as place:
                os.environ["VITREG_MAKING"] = str(making)
                _run(item, given, making, place, progress)
            items.read_folder(item, making)
        except BaseException as error:
            failed = folder / f"{item}.failed.ipynb"
            if (making / f"{item}.ipynb").exists():
                folder.mkdir(exist_ok=True)
                os.replace(making / f"{item}.ipynb", failed)
            raise _explained(error, item, failed) from error
        else:
            _put(making, folder)
        finally:
            os.environ.pop("VITREG_MAKING", None)
            shutil.rmtree(making, ignore_errors=True)
    return folder / f"{item}.ipynb"


@contextmanager
def locked(folder: Path, item: str):
    """A context in which no other process makes the results of this folder. If one does, names it and waits for it."""
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    holder = folder.with_name(f".{folder.name}.process")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with suppress(OSError):
            print(f"{item} is being made by {holder.read_text()}; waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        write_atomically(holder, f"process {os.getpid()} since {time.strftime('%H:%M:%S')}".encode())
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _run(item: str, given: dict, making: Path, place: Path | None, progress: bool) -> None:
    import papermill
    from traitlets.config import Config

    logging.getLogger("papermill").setLevel(logging.ERROR)
    # sockets in a separate folder: kernels that start at the same time cannot compete for ports
    transport = {"transport": "ipc", "ip": f"{place}/kernel"} if place else {}
    papermill.execute_notebook(
        _plain(record.notebook(item)),
        _plain(making / f"{item}.ipynb"),
        parameters=given,
        kernel_name="python3",
        progress_bar=progress,
        start_timeout=180,
        cwd=str(record.notebook(item).parent),  # as JupyterLab and nbval do
        config=Config(KernelManager=transport),
    )


def _plain(path: Path) -> str:
    """A path for papermill; braces are doubled, since they mark parameters."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextmanager
def kernel_folder():
    """A temporary folder for a kernel's sockets and connection file; None if sockets cannot be used.

    Its name contains this process's id. If this process is killed, the next run removes the folder.
    """
    if os.name != "posix":
        yield None
        return
    root = tempfile.gettempdir() if len(tempfile.gettempdir()) <= SOCKET_LENGTH else "/tmp"
    for left in Path(root).glob("vitreg-kernel-*-*"):
        if not _is_alive(int(left.name.split("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"vitreg-kernel-{os.getpid()}-", dir=root) as place:
        os.environ["JUPYTER_RUNTIME_DIR"] = place  # the home folder may be read-only
        yield Path(place)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _recover(folder: Path) -> None:
    """Restore earlier results if a process was killed between the two renames of `_put`."""
    before = folder.with_name(f".{folder.name}.before")
    if before.exists() and not folder.exists():
        os.replace(before, folder)
    shutil.rmtree(before, ignore_errors=True)


def _put(making: Path, folder: Path) -> None:
    """Replace the earlier results by the finished ones."""
    before = folder.with_name(f".{folder.name}.before")
    if folder.exists():
        os.replace(folder, before)
    os.replace(making, folder)
    shutil.rmtree(before, ignore_errors=True)


def _explained(error: BaseException, item: str, failed: Path) -> BaseException:
    """The error of a run as one line: the cell, its message, and a remedy."""
    place = f"see {shown(failed)}"
    if hasattr(error, "evalue"):  # papermill's, for a cell that raised
        line = f"{error.evalue}" if error.ename == "UserError" else f"{error.ename}: {error.evalue}"
        return UserError(f"{item}: {line.splitlines()[0]} (cell {error.exec_count}; {place})")
    if type(error).__name__ == "DeadKernelError":
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        return UserError(
            f"{item}: its kernel was killed after it had taken {peak:.1f} GiB, probably because memory ran out: "
            f"use JOBS=1, a smaller n_images, or close other programs ({place})"
        )
    return error
