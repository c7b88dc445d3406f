"""A wheel works anywhere: built from the sources, installed into an empty environment, used in another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata

import pytest

from vitreg_lib.base import ROOT

SCRIPT = """
import sys
import vitreg_lib, vitreg_lib as vr
from vitreg_lib import cli
assert sys.prefix in vitreg_lib.__file__, vitreg_lib.__file__
for command, code in {commands}:
    got = cli.main(command.split())
    assert got == code, (command, got)
assert vr.load("file:mended.safetensors").role == "mended"
assert vr.measured.load("deit-ti").replayed
"""
COMMANDS = [
    ("models", 0),
    ("data", 0),
    ("diagnose mini-corners --images textures --n-images 8", 0),
    ("mend mini-corners --save mended.safetensors", 0),
    ("measure mini-deit3-xs --n-images 2", 0),
    ("run fig04", 2),
    ("train registers --help", 0),
    ("train --help", 0),
    ("train deit3", 1),
]


@pytest.mark.slow
def test_a_wheel_runs_in_an_empty_environment(tmp_path):
    # setuptools is asked for its version and not imported: it refuses to be where another test imported distutils
    here = [d.version for d in metadata.distributions(name="setuptools")]
    if not here or int(here[0].split(".")[0]) < 77:
        pytest.skip("the wheel is built without network, by the setuptools that is here: none of 77 or later")
    source = tmp_path / "source"
    for name in ("vitreg_lib", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*build, "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    purelib = next((tmp_path / "env").glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", wheel]
    subprocess.run(install, check=True)
    # what it needs comes from here; its own package from the wheel, which stands first
    (purelib / "needed.pth").write_text(sysconfig.get_paths()["purelib"])
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "HF_HOME", "HF_HUB_OFFLINE") if name in os.environ}
    script = SCRIPT.format(commands=COMMANDS)
    done = subprocess.run([python, "-c", script], cwd=folder, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "comes with the repository" in done.stderr
    assert "unknown recipe 'deit3'" in done.stderr and "come with the repository" in done.stderr
    made = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"mended.safetensors", "mini-deit3-xs.safetensors"} <= made
    assert any(name.startswith("results/diagnose/") for name in made), made
    assert (tmp_path / "env" / "bin" / "vitreg").exists()
