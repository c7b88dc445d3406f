"""`make wheelhouse`: collect every package that the project needs as a wheel in one folder, for use without a network.

    python workflow/wheelhouse.py                  # `.[all]` at the versions of constraints.txt, into wheelhouse/
    python workflow/wheelhouse.py --into DIR rich  # some packages, into another folder

If this folder is inside a copy of the repository, `make setup` installs from it and needs no network. Wheels fit only
the operating system and the Python version that they were made with: make a folder for each kind of laptop.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import platform
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from vitreg_lib.base import ROOT, UserError, write_atomically

EVERYTHING = (".[all]", "setuptools>=77", "wheel")  # the last two build the repository's own package on the laptop


def fill(folder: Path, wanted: tuple[str, ...] = EVERYTHING, options: tuple[str, ...] = ()) -> list[Path]:
    """The wheels in `folder`, after pip has put those of `wanted` and all dependencies there.

    options: of pip. Packages without a wheel are built. Raises UserError with pip's last line if pip fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    constraints = ("--constraint", "constraints.txt")
    with _pip() as pip:
        command = [*pip, "wheel", "--wheel-dir", str(folder), *constraints, *options, *wanted]
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise UserError(f"wheelhouse: pip could not get all packages: {lines[-1][:300]}")
    for own in folder.glob("vitreg-*.whl"):
        own.unlink()  # the repository is installed in place, because notebooks and data are used from it
    write_atomically(folder / "README.txt", readme(folder.name).encode())
    return sorted(folder.glob("*.whl"))


def readme(name: str) -> str:
    """The text of README.txt: the commands for a laptop without a network."""
    version = ".".join(platform.python_version_tuple()[:2])
    install = f'-m pip install --no-index --find-links {name} --constraint constraints.txt -e ".[all]"'
    return f"""Wheels for Python {version} on {platform.system()} {platform.machine()}.

Copy the repository with this folder inside to the laptop and open a terminal in it. No network is needed:

Linux, macOS    make workshop PYTHON=python{version}
 without make   python{version} -m venv .venv
                .venv/bin/python {install}
                .venv/bin/python workflow/workshop.py --open
Windows         py -{version} -m venv .venv
                .venv\\Scripts\\python {install}
                .venv\\Scripts\\python workflow\\workshop.py --open
"""


@contextlib.contextmanager
def _pip():
    """The first words of a pip command: this Python's pip, or one in a temporary environment if it has none (uv)."""
    if importlib.util.find_spec("pip"):
        yield [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        return
    with tempfile.TemporaryDirectory() as place:
        venv.create(place, with_pip=True)
        scripts = "Scripts" if platform.system() == "Windows" else "bin"
        yield [str(Path(place) / scripts / "python"), "-m", "pip", "--disable-pip-version-check"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=ROOT / "wheelhouse", help="the folder (wheelhouse)")
    parser.add_argument("packages", nargs="*", default=EVERYTHING, help="what to get (all that the collection needs)")
    chosen = parser.parse_args()
    try:
        wheels = fill(chosen.into.resolve(), tuple(chosen.packages))
    except UserError as error:
        sys.exit(str(error))
    size = sum(path.stat().st_size for path in wheels) / 1e6
    print(f"{len(wheels)} wheels, {size:.0f} MB; {chosen.into.name}/README.txt says how to install without a network")


if __name__ == "__main__":
    main()
