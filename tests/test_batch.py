"""Sweeps, and what is downloaded ahead of time."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from vitreg_lib.base import ROOT, UserError

TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"  # of the entry vit-ti


@pytest.fixture(autouse=True)
def workflow(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "workflow"))


@pytest.fixture
def sweep(tmp_path):
    """A function that writes a sweep's file and reads it."""

    def read(text: str):
        import batch

        (tmp_path / "sweep.yaml").write_text(text)
        return batch.read(tmp_path / "sweep.yaml")

    return read


def test_a_sweep_is_items_times_models_times_parameters(sweep):
    profile, cells = sweep(
        'items: [fig03, fig7]\nmodels: [mini-deit3, "planted mini-clip"]\nparameters: {seed: [0, 1], n_images: 8}'
    )
    assert profile == "mini"
    assert [cell.item for cell in cells] == ["fig03"] * 4 + ["fig07"] * 4
    chosen = [(c.parameters["models"], c.parameters["seed"]) for c in cells[:4]]
    assert chosen == [("mini-deit3", 0), ("mini-deit3", 1), ("planted mini-clip", 0), ("planted mini-clip", 1)]
    assert {cell.parameters["n_images"] for cell in cells} == {8}
    assert len({cell.folder for cell in cells}) == 8


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("items: [fig03", "cannot be read"),
        ("models: [planted]", "items are missing"),
        ("just text", "items are missing"),
        ("items: [fig99]", "unknown item 'fig99'"),
        ("items: [fig03]\nmodel: [planted]", "unknown key of sweep.yaml 'model': did you mean models"),
        ("items: [fig03]\nmodels: [plantet]", "unknown model 'plantet': did you mean planted"),
        ("items: [fig03, fig12]\nparameters: {cutoff: [9.0]}", "unknown parameter of fig12 'cutoff'"),
        ("items: [fig03]\nparameters: {n_images: [8, -1]}", "parameter n_images is -1"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_one_line(sweep, text, told):
    with pytest.raises(UserError) as error:
        sweep(text)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_the_table_has_a_row_a_number_and_a_column_a_parameter(sweep, results):
    import batch

    _, cells = sweep("items: [fig03]\nmodels: [mini-deit3, planted]\nparameters: {seed: [0, 1]}")
    for number, cell in enumerate(cells[:3]):  # the fourth has not been made
        cell.folder.mkdir(parents=True)
        row = {"name": "outlier_share", "model": "m", "value": number / 8, "unit": "", "paper": None}
        (cell.folder / "record.json").write_text(json.dumps({"figures": [], "measured": [row]}))
    table = batch.collect(cells)
    expected = pd.DataFrame(
        {
            "item": ["fig03"] * 3,
            "parameter models": ["mini-deit3", "mini-deit3", "planted"],
            "parameter seed": [0, 1, 0],
            "name": ["outlier_share"] * 3,
            "model": ["m"] * 3,
            "value": [0.0, 0.125, 0.25],
            "unit": [""] * 3,
        }
    )
    pd.testing.assert_frame_equal(table.drop(columns="paper"), expected)
    assert table.paper.isna().all()


def test_the_variance_between_groups_is_that_of_their_means(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "notebooks" / "explore"))
    import sweep

    rows = pd.DataFrame(
        {"parameter models": ["a", "a", "b", "b"], "name": "x", "model": "m", "value": [1.0, 3.0, 5.0, 7.0]}
    )
    chosen = sweep.values(rows, "x", "models")
    assert sweep.explained(chosen) == pytest.approx(16 / 20)  # by hand: total 20, within 2 + 2
    assert sweep.spread(chosen).loc["b"].tolist() == [2, 6.0, 5.0, 7.0]
    with pytest.raises(UserError, match="unknown number of this sweep 'y'"):
        sweep.values(rows, "y", "models")
    with pytest.raises(UserError, match="unknown swept parameter 'seed'"):
        sweep.values(rows, "x", "seed")


def test_what_cannot_be_downloaded_is_named_with_its_place(no_models, capsys):
    import fetch

    assert fetch.main("small", "fig3") == 1
    told = capsys.readouterr().err
    assert "vitreg: vit-ti: model.safetensors cannot be had from the hub" in told
    assert f"of the hub's timm/{TINY} into a folder {TINY} of VITREG_MODELS" in told
    assert "3 of 3 models and data sets cannot be had" in told
    assert fetch.main("small", "fig99") == 1


def test_what_is_in_the_hubs_cache_is_not_downloaded_and_loads_without_a_network(
    no_models, capsys, monkeypatch, tmp_path
):
    import fetch
    import huggingface_hub
    import timm
    from safetensors.torch import save_file

    from vitreg_lib.model import zoo

    place = tmp_path / f"models--timm--{TINY}" / "snapshots" / ("0" * 40)
    place.mkdir(parents=True)
    (place.parents[1] / "refs").mkdir()
    (place.parents[1] / "refs" / "main").write_text("0" * 40)
    module = timm.create_model(TINY.split(".")[0], pretrained=False)
    save_file(module.state_dict(), place / "model.safetensors")
    config = {"architecture": TINY.split(".")[0], "num_classes": 1000, "pretrained_cfg": {"tag": TINY.split(".")[1]}}
    (place / "config.json").write_text(json.dumps(config))
    look = huggingface_hub.file_download.try_to_load_from_cache  # which `no_models` has taken away
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", look)
    for constants in (huggingface_hub.constants, huggingface_hub.file_download.constants):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "wanted", lambda profile, items: (["vit-ti"], []))
    assert fetch.main("small") == 0
    told = capsys.readouterr().out
    assert "vit-ti               hub cache" in told
    assert "all 1 models and data sets are here" in told
    assert zoo.load("vit-ti", "cpu").module.blocks[0].attn.qkv.weight.equal(module.blocks[0].attn.qkv.weight)
