"""The diagnosis of models whose truth is known, the page and the report, and what few or bad images may not cause."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil

import pandas as pd
import pytest
import timm
import torch
from markupsafe import escape
from PIL import Image

import vitreg_lib as vr
from vitreg_lib import cli
from vitreg_lib.base import UserError
from vitreg_lib.model import remedies
from vitreg_lib.record import answers, diagnose, look


@pytest.fixture(scope="module")
def planted():
    return diagnose.controls()[0]


@pytest.fixture
def photos(tmp_path):
    """A folder of 30 small photos of noise in three folders of classes, one of them damaged."""
    for i in range(30):
        folder = tmp_path / "photos" / f"class {i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    (tmp_path / "photos" / "class 0" / "0.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def asked(report, number=0):
    return report["models"][number]["questions"]


def test_planted_artifacts_are_there_with_their_share_and_onset(planted):
    model, numbers = planted.model, planted.numbers
    truth = model.truth(vr.images.load("scenes", model, diagnose.SCENES)).float()
    assert planted.answers["any_there"].answer == "artifacts"
    assert numbers["onset_layer"] == model.onset
    assert numbers["outlier_share"] == pytest.approx(truth.mean().item(), abs=0.003)
    assert numbers["outlier_share_low"] < truth.mean() < numbers["outlier_share_high"]
    places = planted.look.detection.outliers.mask.float().mean(0)
    assert (places - truth.mean(0).view(12, 12)).abs().max() < 0.1


def test_planted_artifacts_are_of_place_and_content_and_hold_what_was_planted(planted):
    numbers = planted.numbers
    assert numbers["follows_place"] > numbers["follows_content"] == 0, "the inner places were never allowed"
    assert numbers["outliers_in_grey"] > 1, "every allowed place is quiet in a grey image"
    assert numbers["pixels_error_outlier"] > numbers["pixels_error_matched"], "they lost their own patch"


def test_the_command_that_is_printed_mends_as_printed(planted, tmp_path, monkeypatch, capsys):
    command = re.search("`(vitreg mend .*?)`", planted.answers["helps"].sentence)[1]
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(command)[1:]) == 0
    mended = vr.load("file:mended.safetensors", "cpu")
    x = vr.images.load("scenes", mended, 32).x
    cutoff, before = planted.numbers["cutoff"], planted.model.capture(x, layers=-1).patch_norms
    after = mended.capture(x, layers=-1).patch_norms
    assert (after > cutoff).float().mean() < 0.1 * (before > cutoff).float().mean()


def test_attention_on_outliers_is_the_mean_over_images(planted):
    seen = planted.look
    images = vr.images.load("scenes", planted.model, diagnose.SCENES)
    rows = planted.model.capture(images, "attention", layers=-1, queries=[0]).attention[7].mean(1)[:, 0, 1:]
    share = (rows * seen.detection.outliers.mask.flatten(1)).sum(1) / rows.sum(1)
    assert planted.numbers["attention_on_outliers"] == pytest.approx(share.mean().item(), rel=1e-5)
    assert planted.numbers["attention_on_outliers"] > 3 * planted.numbers["outlier_share"]


def test_attention_of_a_pooling_head_is_what_it_sums_values_with(planted):
    """Of a SigLIP with one head: the rows times the values are what enters the head's projection."""
    sizes = dict(img_size=96, patch_size=8, depth=1, embed_dim=48, num_heads=1, num_classes=0)
    torch.manual_seed(0)
    siglip = vr.load(timm.create_model("vit_base_patch16_siglip_224", **sizes).eval())
    torch.nn.init.normal_(siglip.module.attn_pool.kv.weight)
    torch.nn.init.normal_(siglip.module.attn_pool.q.weight)
    tokens = torch.randn(len(planted.look.kept), 144, 48)
    rows = answers._pooling(dataclasses.replace(planted.look, model=siglip, tokens=tokens))
    summed, pool = [], siglip.module.attn_pool
    pool.proj.register_forward_pre_hook(lambda part, inputs: summed.append(inputs[0][:, 0]))
    with torch.no_grad():
        siglip.module.forward_head(tokens)
        torch.testing.assert_close((rows[:, None] @ pool.kv(tokens)[..., 48:])[:, 0], summed[0], rtol=1e-4, atol=1e-4)
    assert rows.max() > 2 / 144, "the rows are not all even"
    assert answers._pooling(planted.look) is None


def test_pixels_of_patches_that_are_not_square_are_read():
    torch.manual_seed(0)
    sizes = dict(img_size=64, patch_size=(16, 8), embed_dim=48, depth=2, num_heads=2)
    model = dataclasses.replace(vr.load(timm.create_model("vit_tiny_patch16_224", **sizes)), input_size=64)
    table = answers._local(look.observe(model, "scenes", 20))["pixels"]
    assert table.test["normal", "normal"] == 4 * 4 * 8 and table.relative["normal", "normal"] < 0.7


def test_attention_of_transformers_pooling_head_is_its_own_softmax(planted):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    torch.manual_seed(0)
    module = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**sizes, image_size=96, patch_size=8)
    ).eval()
    pool = next(part for part in module.modules() if hasattr(part, "probe"))
    for weight in (pool.attention.in_proj_weight, pool.attention.in_proj_bias):
        torch.nn.init.normal_(weight, std=0.2)
    tokens = torch.randn(len(planted.look.kept), 144, 48)
    rows = answers._pooling(dataclasses.replace(planted.look, model=vr.load(module), tokens=tokens))
    (wq, wk, _), (bq, bk, _) = pool.attention.in_proj_weight.chunk(3), pool.attention.in_proj_bias.chunk(3)
    with torch.no_grad():
        q, k = (pool.probe[0] @ wq.T + bq).view(2, 24), (tokens @ wk.T + bk).unflatten(2, (2, 24))
        wanted = (torch.einsum("hd,nthd->nht", q, k) / 24**0.5).softmax(-1).mean(1)
    torch.testing.assert_close(rows, wanted, rtol=1e-4, atol=1e-6)
    assert rows.max() > 2 / 144, "the rows are not all even"


def test_remedies_are_scored_beside_random_neurons_on_images_not_searched_on(planted):
    ((title, table),) = planted.answers["helps"].tables.items()
    searched = len(planted.look.sample) // 2
    assert f"{len(planted.look.sample) - searched} images" in title
    assert table.outliers["planted+ttr4"] < 0.1 * table.outliers["planted"] < table.outliers[remedies.RANDOM]
    assert (table.loc["planted", ["features_apart"]].abs() < 1e-6).all()


def test_random_control_is_asked_no_further():
    random = diagnose.controls()[1]
    assert [each.answer for each in random.answers.values()] == ["none"] + ["none to ask about"] * 4
    assert random.numbers["outlier_share"] == 0 and random.numbers["onset_layer"] is None
    assert random.numbers["images_with_outliers_high"] == pytest.approx(1 - 0.05 ** (1 / diagnose.SCENES))


def test_artifacts_of_place_are_called_so():
    found = diagnose.diagnose("mini-corners", "textures", 16)
    assert found.answers["kind"].answer == "position-bound"
    assert found.numbers["follows_place"] > 0.8 > 0.2 > found.numbers["follows_content"]
    measured = vr.images.load("textures", found.model, 16).x  # which the model sees without normalisation
    assert torch.equal(found.look.kept.x, measured[found.look.rows]), (
        "remedies are tried on the images that were judged"
    )


@pytest.mark.parametrize("n", [1, 2, 4])
def test_few_photos_claim_nothing(n, real, capsys, results):
    assert cli.main(["diagnose", "deit-ti", "--n-images", str(n)]) == 0
    text = capsys.readouterr().out
    page, report = (next((results / "diagnose").glob(kind)) for kind in ("*.html", "*.json"))
    content = json.loads(report.read_text())
    assert "Undecided" in text and "would do" in text
    assert {each["answer"] for each in asked(content).values()} == {"undecided"}
    for each in (text, page.read_text(), json.dumps(content["models"])):
        assert "None" not in each and "Artifacts," not in each and "No artifacts" not in each


def test_registers_that_are_copies_are_called_so(planted):
    model = vr.load("planted+ttr4")  # all of them begin as the same token
    found = diagnose.diagnose(model, vr.images.load("scenes", model, 4))
    assert found.numbers["largest_cosine_of_registers"] == pytest.approx(1, abs=1e-4)
    assert "copies of each other" in found.verdict
    differing = vr.load("mini-dinov2-reg4")
    torch.manual_seed(0)
    differing.module.reg_token.data.normal_()
    apart = diagnose.diagnose(differing, vr.images.load("scenes", differing, 4))
    assert apart.numbers["largest_cosine_of_registers"] < answers.COPIES and "4 registers differ" in apart.verdict
    assert planted.numbers["largest_cosine_of_registers"] is None


def test_a_token_that_carries_the_class_names_it_and_its_neighbour_does_not(planted):
    """Class vectors are written into the outliers of kept tokens; nothing else knows of the classes."""
    seen, noise = planted.look, torch.Generator().manual_seed(0)
    labels = torch.arange(len(seen.kept)) % 4
    tokens = torch.randn(seen.tokens.shape, generator=noise)
    mask = torch.cat([torch.zeros(len(tokens), 1, dtype=torch.bool), seen.mask.flatten(1)], 1)
    tokens += 3 * mask[..., None] * torch.randn(4, tokens.shape[-1], generator=noise)[labels][:, None]
    answer = answers.held(dataclasses.replace(seen, tokens=tokens, labels=labels))
    assert answer.answer == "global information"
    assert answer.numbers["accuracy_outlier"] > 0.9 and answer.numbers["accuracy_matched"] < 0.5


def test_kept_tensors_do_not_grow_with_the_images(monkeypatch):
    monkeypatch.setattr(look, "JUDGED", 40)
    monkeypatch.setattr(look, "VALUES", 10 * 145 * 48)
    model = vr.load("mini-random")
    few, many = (look.observe(model, "scenes", n) for n in (40, 200))
    assert len(many.shares) == 200 and len(many.observed.norms) == 40
    assert len(many.kept) == len(few.kept) and many.tokens.shape == few.tokens.shape
    largest = vr.images.load("scenes", model, 40)
    assert torch.equal(many.observed.norms, vr.detection.observe(model, largest).norms)


def test_outliers_are_counted_in_the_images_beyond_the_judged_ones(monkeypatch, planted):
    monkeypatch.setattr(look, "JUDGED", 48)
    seen = look.observe(planted.model, "scenes", diagnose.SCENES)
    norms = planted.model.capture(
        vr.images.load("scenes", planted.model, diagnose.SCENES), "norms", layers=7
    ).patch_norms
    assert torch.allclose(seen.shares, (norms[:, 0] > seen.detection.outliers.cutoff).float().mean(1))


def test_page_and_report_of_several_models_on_a_folder(photos, results, capsys):
    command = ["diagnose", "planted", "mini-random", "--images", str(photos), "--labels", "--json"]
    assert cli.main(command) == 0
    out, errors = capsys.readouterr()
    report = json.loads(out)
    page, kept = (line.partition(": ")[2] for line in errors.splitlines() if line.startswith(("page: ", "report: ")))
    text = open(page).read()
    assert json.loads(open(kept).read()) == report
    assert (
        report["report"] == 1 and report["images"]["number"] == 29 and list(report["images"]["left_out"]) == ["0.png"]
    )
    assert [model["label"] for model in report["models"]] == ["planted", "mini-random"]
    assert [model["label"] for model in report["controls"]] == list(diagnose.CONTROLS)
    for number in range(2):
        assert list(asked(report, number)) == ["any_there", "kind", "held", "hurt", "helps"]
        for each in asked(report, number).values():
            assert each.keys() == {"question", "answer", "sentence", "numbers", "tables"}
            assert each["sentence"] and str(escape(each["sentence"])).replace("`", "") in re.sub("</?code>", "", text)
    assert "0.png" in text and "http" not in text and "NaN" not in out
    assert "planted-and-1-more_photos_" in page
    table = pd.read_parquet(kept.replace(".json", ".parquet"))
    assert not table.duplicated(["model", "measure"]).any() and set(table.model) == {"planted", "mini-random"}
    for number in range(2):
        numbers = {k: v for each in asked(report, number).values() for k, v in each["numbers"].items()}
        values = table[table.model == report["models"][number]["label"]].set_index("measure").value
        assert values.dropna().to_dict() == pytest.approx({k: v for k, v in numbers.items() if v is not None})
    assert cli.main(command) == 0
    assert len(list((results / "diagnose").iterdir())) == 6, "nothing is overwritten"


def test_names_are_escaped_and_no_formula(tmp_path, results):
    evil = tmp_path / "<img src=x>$^$ & co"
    evil.mkdir()
    shutil.copy(vr.base.CHECKPOINTS / "planted.safetensors", evil / "<b>$^$.safetensors")
    Image.new("RGB", (16, 16)).save(evil / "<script>.png")
    (evil / "<i>bad.png").write_bytes(b"no picture")
    found = diagnose.diagnose(f"file:{evil}/<b>$^$.safetensors", str(evil), 4)
    page, _ = diagnose.write([found], time=True, source=str(evil))
    text = page.read_text()
    assert "<b>$" not in text and "<i>bad" not in text and "<img src=x" not in text and "&lt;b&gt;$" in text


def test_a_run_over_time_is_ordered_by_step(tmp_path, results, capsys):
    for step, name in ((2000, "planted"), (300, "mini-deit3")):
        shutil.copy(vr.base.CHECKPOINTS / f"{name}.safetensors", tmp_path / f"step{step}.safetensors")
    assert (
        cli.main(["diagnose", f"file:{tmp_path}", "--over-time", "--images", "scenes", "--n-images", "24", "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    rows = report["over_time"]
    assert report["over_time_in_short"] == "No artifacts at step 300; artifacts at step 2000"
    assert [row["step"] for row in rows] == [300, 2000]
    assert rows[1]["largest_over_median"] > 5 > rows[0]["largest_over_median"]
    assert rows[1]["answer"] == "artifacts"


@pytest.mark.parametrize("kind", ["file", "hf"])
def test_checkpoints_are_files_or_folders_in_order_of_their_numbers(kind, tmp_path):
    for name in ("run-1000", "run-200", "best", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("config.json" if name != "other" else "log.txt")).touch()
    (tmp_path / "epoch=2-step=90.ckpt").touch()
    names = diagnose.checkpoints(f"{kind}:{tmp_path}#vit_tiny_patch16_224")
    assert [name.rpartition("/")[2].partition("#")[0] for name in names] == [
        "epoch=2-step=90.ckpt", "run-200", "run-1000", "best"
    ]  # fmt: skip
    assert all(name.startswith(f"{kind}:") and name.endswith("#vit_tiny_patch16_224") for name in names)
    assert diagnose._steps(names[1:3]) == [200, 1000] and diagnose._steps(names) == [0, 1, 2, 3]
    assert diagnose._steps(["file:training_99/teacher.pth", "file:training_199/teacher.pth"]) == [99, 199]


def test_a_run_is_one_model_and_a_config_of_ones_own_is_no_models(tmp_path, capsys):
    run, name = tmp_path / "mine", f"file:{tmp_path / 'mine'}"
    run.mkdir()
    for place in ("model", "state", "previous"):
        shutil.copy(vr.base.CHECKPOINTS / "mini-deit3.safetensors", run / f"{place}.safetensors")
    (run / "config.json").write_text('{"recipe": "deit3", "steps": 4}')
    assert diagnose.checkpoints(name) == [name]
    assert vr.load(name, "cpu").sha256 == vr.load("mini-deit3", "cpu").sha256
    assert cli.main(["diagnose", name, "--over-time", "--images", "scenes"]) == 1
    assert "needs several checkpoints" in capsys.readouterr().err
    (run / "config.json").write_text('{"learning_rate": 0.1}')
    assert len(diagnose.checkpoints(name)) == 3
    (run / "config.json").write_text('{"model_type": "vit"}')
    assert diagnose.checkpoints(f"hf:{run}") == [f"hf:{run}"]


def test_a_stop_keeps_the_models_before(planted, tmp_path):
    def models():
        yield planted
        raise UserError("last.pth cannot be read")

    with pytest.raises(UserError, match="last.pth cannot be read; the models before are on this page: .*html"):
        diagnose.write(models(), tmp_path, time=True)
    (report,) = tmp_path.glob("*.json")
    assert [model["label"] for model in json.loads(report.read_text())["models"]] == ["planted"]


def test_a_page_that_cannot_be_written_leaves_nothing(planted, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(UserError, match="html cannot be written: No space left"):
        diagnose.write([planted, planted], tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_labels_are_one_line(tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    assert cli.main(["diagnose", "mini-random", "--images", str(tmp_path), "--labels"]) == 1
    assert "write labels.csv (file, class_index)" in capsys.readouterr().err
    with pytest.raises(UserError, match="no weights in this folder"):
        diagnose.checkpoints(f"file:{tmp_path}")


def test_command_names_the_nearest_model(capsys):
    assert cli.main(["diagnose", "mini-deit"]) == 1
    assert "mini-deit3" in capsys.readouterr().err
