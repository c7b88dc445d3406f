"""The diagnosis of a model against controls whose truth is known."""

import pytest
import torch

import vitreg_lib as vr
from vitreg_lib import cli
from vitreg_lib.record import diagnose


@pytest.fixture(scope="module")
def planted():
    model = vr.load("planted")
    images = vr.images.load("scenes", model, 24)
    return model, images, diagnose.diagnose(model, images)


def test_planted_artifacts_are_diagnosed_with_their_share_and_onset(planted):
    model, images, found = planted
    assert found.verdict.startswith("Artifacts")
    assert found.numbers["onset_layer"] == model.onset
    assert found.numbers["outlier_share"] == pytest.approx(model.truth(images).float().mean().item(), abs=0.003)
    assert 5 < found.numbers["norm_ratio"] < 20


def test_attention_on_planted_outliers_exceeds_their_share(planted):
    _, _, found = planted
    assert found.numbers["attention_on_outliers"] > 3 * found.numbers["outlier_share"]


def test_attention_on_outliers_is_the_mean_over_images(planted):
    model, images, found = planted
    rows = model.capture(images, "attention", layers=-1, queries=[0]).attention[7].mean(1)[:, 0, 1:]
    is_outlier = found.captured.patch_norms[:, -1] > found.numbers["cutoff"]
    share = (rows * is_outlier).sum(1) / rows.sum(1)
    assert found.numbers["attention_on_outliers"] == pytest.approx(share.mean().item(), rel=1e-5)


def test_places_are_those_of_the_truth(planted):
    model, images, found = planted
    truth = model.truth(images).float().mean(0).view(12, 12)
    assert (found.places - truth).abs().max() < 0.1


def test_random_control_is_clean():
    model = vr.load("mini-random")
    found = diagnose.diagnose(model, vr.images.load("scenes", model, 24))
    assert found.verdict.startswith("No artifacts")
    assert found.numbers["onset_layer"] is None and found.numbers["outlier_share"] == 0


@pytest.mark.parametrize("n", [1, 2, 4])
def test_few_photos_claim_nothing(n, real, capsys, results):
    assert cli.main(["diagnose", "deit-ti", "--n-images", str(n)]) == 0
    text = capsys.readouterr().out
    assert "Undecided" in text and "would do" in text
    assert "None" not in text and "Artifacts," not in text and "No artifacts" not in text


def test_registers_that_are_copies_are_called_so(planted):
    model = vr.load("planted+ttr4")  # all of them begin as the same token
    verdict = diagnose.diagnose(model, vr.images.load("scenes", model, 4))
    assert verdict.numbers["largest_cosine_of_registers"] == pytest.approx(1, abs=1e-4)
    assert "copies of each other" in verdict.verdict
    torch.manual_seed(0)
    differing = vr.load("mini-dinov2-reg4")
    differing.module.reg_token.data.normal_()
    apart = diagnose.diagnose(differing, vr.images.load("scenes", differing, 4))
    assert apart.numbers["largest_cosine_of_registers"] < diagnose.COPIES and "4 registers differ" in apart.verdict
    assert planted[2].numbers["largest_cosine_of_registers"] is None


def test_page_is_self_contained(planted, tmp_path):
    _, _, found = planted
    text = diagnose.page(found, tmp_path / "page.html").read_text()
    assert found.model.sha256 in text and text.count("data:image/png;base64,") == 3 and "http" not in text


def test_command_names_the_nearest_model(capsys):
    assert cli.main(["diagnose", "mini-deit"]) == 1
    assert "mini-deit3" in capsys.readouterr().err
