"""What everything else rests on: errors a user can mend, where things lie, the environment, files written whole.

VITREG_RESULTS   where results go, by default results/ of the repository, or of the working folder without one
VITREG_CACHE     where features and other intermediate results are kept, by default cache/ of the results
VITREG_MODELS    a folder of models in timm's hub layout, looked in before the hub
VITREG_DATA      a folder of data sets, one folder each
VITREG_MAKING    where the run of a notebook writes until it is whole; set by `vitreg run`
VITREG_BATCH     set: a program runs the notebooks; no progress bars, widgets as pictures
VITREG_PLAIN     set: in a run of several notebooks each imports the libraries for itself; no kernel is forked
"""

import difflib
import functools
import hashlib
import json
import os
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

_LIBRARY = Path(__file__).resolve().parent
_PACKAGED = _LIBRARY / "_data"  # in a wheel: the repository's data/ (see setup.py)
IS_REPOSITORY = not _PACKAGED.is_dir()
ROOT = Path(__file__).resolve().parents[1] if IS_REPOSITORY else Path.cwd()  # where results, runs and notebooks lie
DATA = ROOT / "data" if IS_REPOSITORY else _PACKAGED
CHECKPOINTS = DATA / "checkpoints"
NOTEBOOKS = ROOT / "notebooks"


class UserError(Exception):
    """Shown as one line by the command line, without a traceback."""


def line(error: Exception) -> str:
    """An error's message on one line, as part of a sentence; its kind where it says nothing."""
    return " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__


def unknown(kind: str, value: str, valid: Iterable[str], hint: str = "") -> UserError:
    """An error for an unknown name, with the nearest valid ones (or all, where there are few)."""
    valid = sorted(valid)
    near = difflib.get_close_matches(value, valid, n=3, cutoff=0.5)
    if near:
        text = f"did you mean {' or '.join(near)}?"
    else:
        text = "known: " + ", ".join(valid[:20]) + (" …" if len(valid) > 20 else "")
    return UserError(f"unknown {kind} {value!r}: {text}{' ' + hint if hint else ''}")


@contextmanager
def hub(what: str, instead: str, local: bool = False):
    """Inside, a failure of the hub's client becomes a UserError: it names `what` is missing and what to do `instead`.

    Without a network only the hub's cache is used: the client would try for a minute. local: it reads a folder.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        if not before and not urllib.request.getproxies():
            socket.getaddrinfo(urllib.parse.urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub raises many kinds
        absent = isinstance(error, OSError) and not local
        why = "no network, no access, or no such thing there" if absent else line(error)
        where = "" if local else " from the hub"
        raise UserError(f"{what} cannot be had{where} ({type(error).__name__}: {why}): {instead}") from error
    finally:
        constants.HF_HUB_OFFLINE = before


def env_folder(variable: str) -> Path | None:
    """The folder that an environment variable names, absolute; None where it is not set."""
    return Path(os.environ[variable]).expanduser().resolve() if os.environ.get(variable) else None


def local_rank() -> int | None:
    """The number of this process among those that torchrun started on this machine; None without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


def results() -> Path:
    """Where results go."""
    return env_folder("VITREG_RESULTS") or ROOT / "results"


def cache() -> Path:
    """Where features and other intermediate results are kept."""
    return env_folder("VITREG_CACHE") or results() / "cache"


def fingerprint(about: dict) -> str:
    """sha256 of a description that JSON can hold."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def remembered(about: dict, compute):
    """The result of `compute()` (anything that JSON holds), kept in `cache` under the fingerprint of `about`."""
    path = cache() / f"{fingerprint(about)}.result.json"
    try:
        stored = json.loads(path.read_text())
        if stored["sha256"] == fingerprint({"about": about, "result": stored["result"]}):
            return stored["result"]
    except (OSError, ValueError, KeyError):
        pass  # not there, or damaged: computed below
    result = json.loads(json.dumps(compute()))
    sha256 = fingerprint({"about": about, "result": result})
    with suppress(UserError):  # without room or rights it is computed each time
        write_atomically(path, json.dumps({"about": about, "result": result, "sha256": sha256}).encode())
    return result


@functools.cache
def code_sha256() -> str:
    """sha256 of the library's code: what other code computed is computed anew."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_LIBRARY.rglob("*.py")))).hexdigest()


def in_batch() -> bool:
    """Whether a program runs the notebooks (papermill, tests, `make refresh`), so that nobody sees bars or widgets."""
    return bool(os.environ.get("VITREG_BATCH"))


def commit() -> str:
    """The commit of the code, 12 digits, with "+" where a tracked file differs from it; "" outside of a repository.

    docs/ and README.md do not count: numbers do not come from there, and kept results go there.
    """
    run = {"cwd": ROOT, "capture_output": True, "text": True}
    try:
        name = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        differing = ["git", "diff", "--name-only", "HEAD", "--", ".", ":!docs", ":!README.md"]
        return name + ("+" if name and subprocess.run(differing, **run).stdout else "")
    except OSError:
        return ""


def shown(path: Path) -> str:
    """A path to print: relative to the repository inside it."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


@contextmanager
def written(path: Path):
    """A temporary path beside `path`, to be written to inside; it takes the name of `path` when the block ends well.

    Otherwise nothing is left and what was there stays. Several processes and threads may write the same file at once.
    Raises UserError where the system refuses, as for want of room or rights.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # so the system itself refuses, in its words, and sets the rights
        rights = temporary.stat().st_mode
        yield temporary
        temporary.chmod(rights)  # safetensors gives the owner alone the right to read
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with written(path) as temporary:
        temporary.write_bytes(content)
