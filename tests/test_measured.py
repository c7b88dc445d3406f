"""Measurements that are replayed: what the file says is what the model says, and what is not in it is refused."""

from __future__ import annotations

import re

import fig13
import fig14
import fig20
import pytest
import tables
import tables_tasks
import tables_tokens
import torch

import vitreg_lib as vr
from vitreg_lib import cli
from vitreg_lib.base import UserError
from vitreg_lib.data import images
from vitreg_lib.hooks.capture import capture
from vitreg_lib.model import measured, zoo
from vitreg_lib.model.weights import file_sha256
from vitreg_lib.record import run


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(model, pictures, path of its measurements, made by the command)."""
    path = tmp_path_factory.mktemp("measured") / "mini.safetensors"
    arguments = ["measure", "mini-deit3-reg4", "--images", "scenes", "--n-images", "5", "--out", str(path)]
    assert cli.main(arguments) == 0
    model = zoo.load("mini-deit3-reg4", "cpu")
    return model, images.load("scenes", model, 5), path


def test_a_replayed_capture_is_that_of_the_model(written):
    model, pictures, path = written
    replayed = measured.load(str(path))
    live = capture(model.module, pictures.x, ("norms", "attention"), layers=[-2, -1], queries=[0, 3])
    again = replayed.capture(pictures, ("norms", "attention"), layers=[-2, -1], queries=[0, 3])
    torch.testing.assert_close(again.norms, live.norms, rtol=1e-3, atol=0)
    for block in live.attention:
        torch.testing.assert_close(again.attention[block], live.attention[block], rtol=1e-3, atol=1e-6)
    assert (again.layers, again.grid, again.queries) == (live.layers, live.grid, live.queries)
    assert again.prefix == live.prefix and len(live.registers) == 4


def test_images_are_recognised_in_any_order(written):
    model, pictures, path = written
    some = pictures.x[[3, 0]]
    expected = model.capture(some).norms
    torch.testing.assert_close(measured.load(str(path)).capture(some).norms, expected, rtol=1e-3, atol=0)


def test_facts_about_the_model_are_kept(written):
    model, _, path = written
    replayed = measured.load(str(path))
    for name in ("name", "label", "sha256", "role", "input_size", "mean", "base", "registers_from", "head", "entry"):
        assert getattr(replayed, name) == getattr(model, name), name
    for name in ("depth", "prefix", "embed_dim", "num_heads", "head_dim", "patch_size"):
        assert getattr(replayed.anatomy, name) == getattr(model.anatomy, name), name
    assert replayed.replayed and not model.replayed
    about = replayed.measured
    assert about["command"] == "vitreg measure mini-deit3-reg4 --images scenes --n-images 5"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"]) and about["commit"]


def test_images_that_are_not_square_are_replayed(tmp_path):
    path = tmp_path / "wide.safetensors"
    arguments = ["measure", "mini-deit3", "--size", "64", "96", "--images", "photos", "--n-images", "2"]
    assert cli.main([*arguments, "--out", str(path)]) == 0
    model, replayed = zoo.load("mini-deit3", "cpu", image_size=(64, 96)), measured.load(str(path))
    wide = images.load("photos", model, 2)
    torch.testing.assert_close(replayed.capture(wide).norms, model.capture(wide).norms, rtol=1e-3, atol=0)
    with pytest.raises(UserError, match=r"images of 96 x 64 pixels \(measured: 64 x 96\)"):
        replayed.capture(wide.x.transpose(2, 3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(keep="tokens"), "tokens was not measured"),
        (dict(keep="attention", layers=0), "attention of block 0"),
        (dict(keep="attention", layers=-1, queries=[40]), "attention of token 40"),
    ],
)
def test_what_was_not_measured_is_refused_in_one_line(written, options, words):
    _, pictures, path = written
    with pytest.raises(UserError, match=words) as refused:
        measured.load(str(path)).capture(pictures, **options)
    assert "\n" not in str(refused.value) and "VITREG_MODELS" in str(refused.value)


def test_other_images_and_running_the_module_are_refused(written):
    model, _, path = written
    replayed = measured.load(str(path))
    with pytest.raises(UserError, match="images other than scenes"):
        replayed.capture(images.load("scenes", model, 2, seed=5))
    with pytest.raises(UserError, match="its weights are not here"):
        replayed.module(torch.zeros(1, 3, 96, 96))


def test_the_detector_gives_one_answer_live_and_replayed(written):
    model, pictures, path = written
    live, again = vr.detect(model, pictures), vr.detect(measured.load(str(path)), pictures)
    assert (live.answer, live.reason) == (again.answer, again.reason)


def test_shipped_measurements_are_small_and_say_where_they_come_from():
    assert {"deit-ti", "deit-ti+ttr4", "vit-ti", "vit-ti+ttr4", "dinov2-s"} <= set(measured.names())
    assert sum(path.stat().st_size for path in measured.FOLDER.iterdir()) < 6e6
    for name in measured.names():
        about = measured.load(name).measured
        assert about["source"].startswith("photos shipped with scikit-image")
        assert len(about["photos"]) == 10 and all(re.fullmatch("[0-9a-f]{64}", h) for h in about["photos"].values())
        assert about["command"].startswith(("vitreg measure", "python workflow/measured.py")) and not about[
            "commit"
        ].endswith("+"), name
        assert about["model"]["label"] == name and len(about["model"]["sha256"]) == 64


def test_the_photos_of_the_measurements_are_those_installed():
    hashes = {path.stem: file_sha256(path) for path in images.find("photos")[0]}
    assert measured.load("vit-ti").measured["photos"] == hashes


def test_the_default_profile_replays_real_models_on_photos(no_models, results, capsys):
    ours = run.Run("fig03", run.check_parameters("fig03", {"models": "deit-ti mini-deit3"}))
    deit, mini = ours.load()
    assert deit.replayed and not mini.replayed
    assert "replayed from measurements, without weights: deit-ti\n" in capsys.readouterr().out
    assert [ours.source(m) for m in (deit, mini)] == ["photos", "scenes"]
    assert ours.by_source([deit, mini]) == [[deit], [mini]]
    found = vr.detect(deit, ours.images(deit))
    assert found.answer == "artifacts" and found.kind == "content-bound" and found.images == 10


def test_answers_on_the_shipped_photos(no_models):
    answers = {}
    for name in measured.names():
        model = measured.load(name)
        answers[name] = vr.detect(model, images.load("photos", model, 10))
    assert answers["vit-ti"].answer == answers["deit-ti"].answer == "artifacts"
    assert answers["dinov2-s"].answer == "none"
    for name in ("vit-ti", "deit-ti"):  # registers added at test time: the artifacts are gone from the patches
        mended = measured.load(f"{name}+ttr4").capture(images.load("photos", measured.load(name), 10))
        share = (mended.patch_norms[:, -1] > answers[name].outliers.cutoff).float().mean()
        assert share < 0.2 * answers[name].share[0], (name, share)


def test_probes_of_measured_features_find_what_outliers_know(no_models):
    """On DeiT-Ti one artifact names the class of a photo where the normal token beside it does not."""
    models = [measured.load(name) for name in ("deit-ti", "deit-ti-trained-reg1")]
    found = tables.classify(models, [], strengths=(1e-2, 1.0))
    score = found.table.score["deit-ti", "caltech101-small"]
    assert score["cls"] > 0.9 and score["outlier"] > score["matched"] + 0.15
    assert tables.gaps(found).low["deit-ti", "caltech101-small"] > 5
    assert found.owner == {"deit-ti": "deit-ti", "deit-ti-trained-reg1": "deit-ti"}
    assert {"cls", "normal", "register"} == set(found.table.loc["deit-ti-trained-reg1", "caltech101-small"].index)
    assert (
        found.table.loc["deit-ti-trained-reg1", "caltech101-small", "cls"].train
        == found.table.loc["deit-ti", "caltech101-small", "cls"].train
    )  # the same images, those with an outlier in the model without


def test_measured_features_and_maps_are_those_of_the_model(real, tmp_path, monkeypatch):
    """The columns in the file are the ones that a run with the weights extracts, and so are LOST's maps."""
    monkeypatch.setenv("VITREG_CACHE", str(tmp_path))
    model, replayed = zoo.load("vit-ti", "cpu"), measured.load("vit-ti")
    _, parts = tables.kept_problem(replayed, "cifar10-small")
    facts = replayed.measured["sets"]["cifar10-small"]
    (problem,) = tables_tasks.load("cifar10-small", len(parts[0].column("cls")), len(parts[1].column("cls")))
    live = tables_tokens.classification_tokens(model, problem.test, facts["cutoff"], draws=2)
    for name in ("cls", "normal", "outlier", "matched"):
        torch.testing.assert_close(parts[1].column(name), live.column(name), rtol=0, atol=0.02)
    pictures = images.load("photos", model, 10)
    steps = [fig13.steps(each, pictures, "v") for each in (model, replayed)]
    assert (steps[0].seeds == steps[1].seeds).all() and (steps[0].boxes == steps[1].boxes).all()
    torch.testing.assert_close(
        fig14.value_gain(replayed, pictures), fig14.value_gain(model, pictures), rtol=1e-2, atol=0
    )
    for one, other in zip(*(fig20.components(each, pictures) for each in (model, replayed)), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0.02)


def test_live_and_replayed_agree_on_real_weights(real):
    for name in ("deit-ti", "vit-ti+ttr4"):
        model, replayed = zoo.load(name, "cpu"), measured.load(name)
        assert model.sha256 == replayed.sha256
        pictures = images.load("photos", model, 10)
        live = model.capture(pictures, ("norms", "attention"), layers=-1)
        again = replayed.capture(pictures, ("norms", "attention"), layers=-1)
        torch.testing.assert_close(again.norms, live.norms, rtol=2e-3, atol=0)
        torch.testing.assert_close(again.attention[11], live.attention[11], rtol=1e-2, atol=1e-5)
        found = [vr.detect(each, pictures) for each in (model, replayed)]
        assert found[0].answer == found[1].answer
        assert found[0].share[0] == pytest.approx(found[1].share[0], abs=1e-3)
