"""A recipe of one's own, the one that CONTRIBUTING.md shows: its options, stop and resume, and what comes out."""

from __future__ import annotations

import json
import pickle
import re

import pytest

from vitreg_lib import cli
from vitreg_lib.base import ROOT, UserError
from vitreg_lib.model import zoo
from vitreg_lib.train import loop, recipes, state

SMALL = dict(size="xxs", image_size=64, steps=6, batch_size=8, warmup=2, save_every=2, eval_images=16, turns=3)


@pytest.fixture
def own(tmp_path):
    """The file of the recipe, in a folder of its own."""
    source = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL).group(1)
    path = tmp_path / "theirs" / f"turns_{tmp_path.name.replace('-', '_')}.py"
    path.parent.mkdir()
    path.write_text(source)
    return path


def test_its_help_has_its_docstring_and_options(own, capsys):
    assert cli.main(["train", str(own), "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "By how many quarter turns was an image turned?" in text
    assert "--turns" in text and "(default: 4)" in text and "(default: 500)" in text


def test_a_stopped_run_resumes_from_anywhere_with_the_same_weights(own, tmp_path, monkeypatch, assert_same_run, capsys):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    monkeypatch.chdir(own.parent)
    assert cli.main(["train", own.name, *options, "--device", "cpu", "--out", str(straight)]) == 0

    def stop(step, loss):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(*loop.configure(own.name, **SMALL), halves, progress=False, on_step=stop)
    monkeypatch.chdir(tmp_path)  # the run's config.json holds where the recipe is
    assert cli.main(["train", "--resume", str(halves), "--device", "cpu"]) == 0
    assert_same_run(straight, halves)
    model = zoo.load(f"file:{halves / 'model.safetensors'}", "cpu")
    assert model.family == own.stem and model.module.num_classes == 3


def test_an_edited_recipe_is_read_again(own, tmp_path):
    _, first = loop.configure(str(own))
    before = own.read_text()
    own.write_text(before.replace('"steps": 500', '"steps": 700'))  # as long, and in the same second
    config, edited = loop.configure(str(own), save_every=7)
    assert (config.steps, edited.DEFAULTS["steps"], first.DEFAULTS["steps"]) == (700, 700, 500)
    own.write_text(before.replace("telemetry_images = training_images.telemetry_images\n", "VALUE = 1\n"))
    config, edited = loop.configure(str(own), save_every=7)
    assert (config.steps, edited.VALUE, hasattr(edited, "telemetry_images")) == (500, 1, False)
    assert loop.configure(str(own), save_every=7) == (config, edited)  # unchanged: not imported again
    assert pickle.loads(pickle.dumps(edited.turned)) is edited.turned  # as worker processes get it
    state.claim(tmp_path / "run", config)
    assert state.read_config(tmp_path / "run") == config  # as --resume reads it


def test_an_option_of_another_recipe_is_refused(own):
    with pytest.raises(UserError, match="unknown option of .* 'turnz': did you mean turns"):
        loop.configure(str(own), turnz=2)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no recipe .*absent.py"):
        recipes.find(str(tmp_path / "absent.py"))


def test_a_file_named_as_an_imported_module_is_refused(tmp_path):
    (tmp_path / "json.py").write_text("")
    with pytest.raises(UserError, match="json.py: another module of that name"):
        recipes.load(str(tmp_path / "json.py"))


def test_a_run_from_before_recipes_had_options_of_their_own_is_read(tmp_path):
    """Its config.json held the options of every recipe."""
    config, _ = loop.configure("mae", steps=3, mask_ratio=0.5)
    state.claim(tmp_path, config)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prototypes": 1024, "variant": "", "augment": "3a"}))
    assert state.read_config(tmp_path) == config
    state.claim(tmp_path, config)
