"""The explorer without a browser: its views are what the library measures, and a state repeats in batch."""

from __future__ import annotations

import io
import shlex
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

import vitreg_lib as vr
from vitreg_lib import widgets
from vitreg_lib.base import UserError
from vitreg_lib.data import images
from vitreg_lib.hooks import capture
from vitreg_lib.measure import attention, maps
from vitreg_lib.model import measured, zoo
from vitreg_lib.record import run as record
from vitreg_lib.widgets import state as choice
from vitreg_lib.widgets import view as explorer
from vitreg_lib.widgets.state import State, Store

PAIR = State(models=("mini-deit3", "mini-deit3-reg4"), images="scenes", image=1)


@pytest.fixture(autouse=True)
def a_reader(monkeypatch):
    """Not a batch run, whatever the tests' caller has set."""
    monkeypatch.delenv("VITREG_BATCH", raising=False)


@pytest.fixture(scope="module")
def store():
    return Store()


@pytest.fixture(scope="module")
def registers():
    """The mini model with registers, scene 1 and all that the library keeps of it: rows of all tokens too."""
    model = zoo.load("mini-deit3-reg4", "cpu")
    batch = images.load("scenes", model, choice.MAX_IMAGES)
    x = batch.x[1:2]
    tokens = model.anatomy.num_prefix_tokens + 144
    return model.capture(x, ("norms", "tokens", "attention"), queries=range(tokens)), model.capture(batch, "norms")


@pytest.mark.parametrize(
    ("query", "token"), [("cls", 0), ("register 3", 3), ("patch (0, 0)", 5), ("patch (3, 4)", 5 + 40)]
)
@pytest.mark.parametrize("heads", [(), (1,), (0, 2)])
@pytest.mark.parametrize("layer", [0, -1])
def test_views_are_what_capture_and_maps_give(store, registers, layer, heads, query, token):
    seen, every = registers
    view = explorer.look(replace(PAIR, layer=layer, heads=heads, query=query), store)[1]
    layer %= 8
    wanted = attention.maps(seen, layer, [token], list(heads) or None)[0, 0]
    torch.testing.assert_close(view.attention_share, wanted, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(view.attention, wanted / wanted.mean(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(view.norms.flatten(), seen.patch_norms[0, layer])
    patches = seen.patches(seen.tokens[layer])
    parts = maps.principal_components(patches, 3, per_image=True, grid=seen.grid)
    torch.testing.assert_close(view.components.flatten(0, 1), parts[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(view.similarity.flatten(), maps.neighbour_similarity(patches, seen.grid)[0])
    torch.testing.assert_close(view.forward.set_norms[layer], every.patch_norms[:, layer].flatten())
    assert sum(view.budget.values()) == pytest.approx(1, abs=1e-5)
    assert view.query == query
    assert view.counts.sum().item() == pytest.approx(1)
    assert view.set_counts.sum().item() == pytest.approx(1)


def test_the_cutoff_by_rule_is_the_detectors(store):
    model = zoo.load("planted", "cpu")
    found = vr.detect(model, images.load("scenes", model, choice.MAX_IMAGES))
    last, third = (explorer.look(replace(PAIR, models=("planted",), layer=layer), store)[0] for layer in (7, 3))
    assert found.outliers.layer == 7 and last.cutoff == pytest.approx(found.outliers.cutoff, rel=1e-5)
    assert torch.equal(last.is_outlier, found.outliers.mask[1])
    medians = [view.forward.set_norms[view.layer].median().item() for view in (last, third)]
    assert third.cutoff / medians[1] == pytest.approx(last.cutoff / medians[0])
    assert last.verdict == f"artifacts: {found.strength}, {found.kind}"


def test_components_beyond_the_colours_leave_no_warning(caplog):
    (view,) = widgets.explore("deit-ti", "photos").views
    far = replace(view, components=9 * torch.sign(view.components))
    assert widgets.still.explorer([far]).axes and "Clipping" not in caplog.text


def test_a_cutoff_by_hand_paints_what_is_above_it(store):
    view = explorer.look(replace(PAIR, cutoffs=(None, 3.0)), store)[1]
    assert view.cutoff == 3.0 and not view.by_rule
    assert torch.equal(view.is_outlier, view.norms > 3)
    share = view.attention_share[view.is_outlier].sum().item()
    assert view.budget["outliers"] == pytest.approx(share, abs=1e-6)


def test_a_model_that_lacks_the_query_says_what_it_shows_instead(store):
    views = explorer.look(replace(PAIR, query="register 2"), store)
    assert views[0].query == "cls" and views[0].notes == ("has no registers: cls is shown",)
    assert views[1].query == "register 2" and not views[1].notes


def test_a_patch_keeps_its_place_on_another_grid():
    seen = capture.Capture((0,), (16, 16), ("cls",))
    assert explorer.query_token("patch (0, 0)", seen, (12, 12))[0] == 1
    assert explorer.query_token("patch (11, 11)", seen, (12, 12))[0] == 256
    assert explorer.query_token("patch (6, 3)", seen, (12, 12))[0] == 1 + 8 * 16 + 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 8}, "layer 8 out of range for 8 blocks"),
        ({"layer": -9}, "layer -9 out of range"),
        ({"heads": (3,)}, "head 3 out of range for 3 heads"),
        ({"query": "register 5"}, "registers of mini-deit3 and mini-deit3-reg4: 4"),
        ({"query": "patch (12, 0)"}, "out of range for a grid of 12 x 12"),
        ({"query": "token 3"}, 'write "cls", "register 1" or "patch'),
        ({"image": 12}, "image 12 out of range for the 12 images of 'scenes'"),
        ({"models": ("mini-deit3",) * 3}, "3 models"),
        ({"models": ("mini-deit4",)}, "mini-deit4"),
        ({"images": "/nowhere"}, "no images at '/nowhere'"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(store, changes, message):
    with pytest.raises(UserError) as error:
        explorer.look(replace(PAIR, **changes), store)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_heads_and_cutoffs_are_read_from_text():
    assert choice.parse_heads("0 3") == choice.parse_heads((3, 0)) == choice.parse_heads("3,0") == (0, 3)
    assert choice.parse_heads("mean") == choice.parse_heads("") == ()
    assert choice.parse_cutoffs("150 rule") == (150.0, None)
    for wrong in ("x", "1.5", "-1"):
        with pytest.raises(UserError, match="head"):
            choice.parse_heads(wrong)
    with pytest.raises(UserError, match="cutoffs"):
        choice.parse_cutoffs("high")


@pytest.mark.parametrize("query", ["cls", "register 2", "patch (3, 4)"])
def test_the_copied_commands_are_accepted_by_their_notebooks(store, query):
    state = replace(PAIR, layer=3, heads=(0, 2), query=query, cutoffs=(None, 2.5))
    for line in explorer.commands(state, explorer.look(state, store)).splitlines():
        program, run, item, *words = shlex.split(line)
        assert (program, run) == ("vitreg", "run")
        assert words[::3] == ["-p"] * (len(words) // 3)
        types = record.declared_parameters(item)
        given = {name: type(types[name])(text) for name, text in zip(words[1::3], words[2::3], strict=True)}
        checked = record.check_parameters(item, given)
        if item == "explorer":
            again = State(
                tuple(checked["models"].split()),
                checked["images"],
                checked["image"],
                checked["layer"],
                choice.parse_heads(checked["heads"]),
                checked["query"],
                choice.parse_cutoffs(checked["cutoffs"]),
            )
            assert again == state


def own(name: str, seed: int):
    """A small random model of timm's, given as a value."""
    torch.manual_seed(seed)
    module = timm.create_model(name, img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2)
    for key, weights in module.named_parameters():
        if "relative_position_bias" in key:
            torch.nn.init.normal_(weights, std=2.0)
    return replace(zoo.load(module), input_size=64)


def test_two_own_models_of_one_class_stay_apart():
    models = [own("vit_tiny_patch16_224", seed) for seed in (0, 1)]
    store = Store()
    names = [store.add(model) for model in (*models, models[0])]
    assert names[0] == names[2] != names[1]
    x = images.load("scenes", models[0], choice.MAX_IMAGES).at([0])
    for name, model in zip(names[:2], models, strict=True):
        seen = store.forward(name, "scenes", 0)
        assert torch.equal(seen.capture.norms, model.capture(x).norms) and seen.label == name


@pytest.mark.parametrize("query, token", [("cls", 0), ("patch (2, 1)", 10)])
def test_a_bias_of_attention_is_part_of_its_map(query, token):
    model, store = own("beitv2_base_patch16_224", 0), Store()
    (view,) = explorer.look(State(models=(store.add(model),), images="scenes", query=query), store)
    x = images.load("scenes", model, choice.MAX_IMAGES).at([0])
    seen = model.capture(x, "attention", layers=-1, queries=[token])
    torch.testing.assert_close(view.attention_share, attention.maps(seen, queries=[token])[0, 0])


def test_the_store_keeps_little_and_forgets_what_failed():
    messages = []
    store = Store(messages.append)
    one = store.forward("mini-deit3", "scenes", 0)
    assert store.forward("mini-deit3", "scenes", 0) is one
    assert len(messages) == 3  # model, norms of the images, all layers of one
    with pytest.raises(UserError):
        store.forward("mini-deit3", "scenes", 99)
    assert len(store._forwards) == 1
    for image in range(choice.KEPT + 2):
        store.forward("mini-deit3", "scenes", image)
    assert list(store._forwards) == [("mini-deit3", "scenes", image) for image in range(2, choice.KEPT + 2)]


def decoded(sent: dict, name: str) -> torch.Tensor:
    """A map that a canvas was sent."""
    return torch.from_numpy(np.frombuffer(sent[name], "<f4").copy())


def test_it_opens_on_real_models_as_they_were_measured(no_models):
    """What the page is sent are the numbers of data/measured."""
    shown = widgets.explore(image=2, query="register 2")
    assert shown.state.models == ("deit-ti", "deit-ti-trained-reg4") and shown.state.images == "photos"
    names = images.load("photos", measured.load("deit-ti"), choice.MAX_IMAGES).names
    for name, token, canvas in zip(shown.state.models, (0, 2), shown.page.canvases, strict=True):
        file, sent = load_file(measured.FOLDER / f"{name}.safetensors"), canvas.view
        prefix = file["norms"].shape[2] - 196
        torch.testing.assert_close(decoded(sent, "norms"), file["norms"][2, 11, prefix:].float())
        row = file["attention.11"][2, :, token, prefix:].float().mean(0)
        torch.testing.assert_close(decoded(sent, "share"), row, rtol=1e-4, atol=1e-7)
        rgb = np.frombuffer(sent["components"], np.uint8).reshape(14, 14, 3) / 255
        np.testing.assert_allclose(rgb, (file["components"][2].float().numpy() / 6 + 0.5).clip(0, 1), atol=3e-3)
        assert decoded(sent, "similarity").isnan().all()
        assert sent["missing"] == {"similarity": "neighbour similarity was not measured"}
        assert sent["image_name"] == names[2] and sent["role"] == "trained, replayed"
    assert shown.page.canvases[0].view["verdict"] == "artifacts: mild, content-bound"
    twin = measured.load("deit-ti-trained-reg4")
    found = vr.detect(twin, images.load("photos", twin, choice.MAX_IMAGES))
    assert shown.page.canvases[1].view["because"] == str(found) and not found.has_artifacts
    shown.choose(component=2)
    sent = decoded(shown.page.canvases[0].view, "components")
    wanted = load_file(measured.FOLDER / "deit-ti.safetensors")["components"][2, ..., 1]
    torch.testing.assert_close(sent, wanted.float().flatten())


def test_what_was_not_measured_is_disabled_with_its_reason(no_models):
    shown = widgets.explore("vit-ti vit-ti+ttr4")
    page, early = shown.page, "attention was measured in blocks 8 to 11 only"
    heads = page.heads.children[1:]
    assert not any(widget.disabled for widget in (page.query, page.opacity, page.component, page.layer, *heads))
    assert all(widget.disabled for widget in (page.source, page.path, page.upload))
    alone = "Grey controls: vit-ti and vit-ti+ttr4 were measured on the photos alone"
    assert page.why.value == alone
    page.layer.value = 5
    assert all(widget.disabled for widget in (page.query, page.opacity, page.component, *heads))
    assert {button.tooltip for button in heads} == {early}
    assert page.why.value == f"{alone}; {early}; components were measured after block 11 only"
    sent = page.canvases[1].view
    assert sent["missing"]["attention"] == early and sent["budget"] is None
    assert sent["notes"][-1].startswith("vit-ti+ttr4 was measured on 20") and "VITREG_MODELS" in sent["notes"][-1]
    assert decoded(sent, "norms").isfinite().all() and decoded(sent, "share").isnan().all()
    assert shown.static().axes  # is drawn without what is missing
    page._asked(0, {"kind": "query", "query": [3, 4]}, [])
    assert "attention of patch (3, 4) was not measured, only that of cls, patch (7, 7)" in page.status.value
    assert shown.state.query == "cls"
    page._asked(0, {"kind": "query", "query": [7, 7]}, [])  # the one at the centre was
    page.layer.value = 11
    row = load_file(measured.FOLDER / "vit-ti.safetensors")["attention.11"][0, :, 1, 1:].float().mean(0)
    torch.testing.assert_close(decoded(page.canvases[0].view, "share"), row, rtol=1e-4, atol=1e-7)
    page.layer.value = 11
    assert not any(widget.disabled for widget in (page.query, page.opacity, page.component, *heads))
    page.second.value = "mini-deit3"  # a live one beside it can be asked, on the same photos
    page._asked(1, {"kind": "query", "query": [5, 5]}, [])
    assert shown.state.query == "patch (6, 6)" and not page.query.disabled
    assert "attention" in shown.views[0].missing and not shown.views[1].missing
    page.first.value = "planted"
    assert not page.source.disabled and page.why.value == ""
    page.source.value = "scenes"
    page.first.value = "deit-ti"  # was measured on photos alone: these come back
    assert shown.state.images == "photos" and page.source.disabled


def test_a_replayed_model_is_given_as_a_value(no_models):
    assert [view.label for view in widgets.explore([measured.load("deit-ti")]).views] == ["deit-ti"]


def test_a_control_draws_anew_and_batch_draws_once(monkeypatch):
    seen, open_before = [], plt.get_fignums()

    def draw(layer, of):
        seen.append((layer, of))
        return plt.figure()

    menu = ("Dropdown", {"value": "a", "options": ["a", "b"]})
    controls = {"layer": ("IntSlider", {"value": 2, "max": 5}), "of": menu}
    monkeypatch.delenv("VITREG_BATCH", raising=False)
    slider, menu, _ = widgets.interact(draw, **controls).children
    assert (slider.description, slider.continuous_update) == ("layer", False)
    slider.value, menu.value = 4, "b"
    assert seen == [(2, "a"), (4, "a"), (4, "b")]
    monkeypatch.setenv("VITREG_BATCH", "1")
    assert isinstance(widgets.interact(draw, **controls), Figure) and seen[3:] == [(2, "a")]
    assert plt.get_fignums() == open_before


def test_in_batch_it_is_a_picture_and_otherwise_a_page(monkeypatch):
    monkeypatch.setenv("VITREG_BATCH", "1")
    shown = widgets.explore("mini-deit3", "scenes")
    assert shown.page is None
    bundle = shown._repr_mimebundle_()
    assert set(bundle) == {"image/png", "text/plain"}
    assert bundle["text/plain"] == "mini-deit3: block 7 (of 0 to 7) · mean of 3 heads · query cls"
    monkeypatch.delenv("VITREG_BATCH")
    assert widgets.explore(zoo.load("mini-deit3", "cpu"), "scenes").page is not None


def test_controls_and_canvas_messages_change_the_state(results):
    shown = widgets.explore("mini-deit3 mini-deit3-reg4", "scenes")
    page = shown.page
    page.layer.value = 2
    page.heads.children[3].value = True  # mean, 0, 1 … after the label
    page._asked(1, {"kind": "query", "query": [4, 7]}, [])
    page._asked(1, {"kind": "cutoff", "value": 2.0}, [])
    assert shown.state == replace(PAIR, image=0, layer=2, heads=(1,), query="patch (4, 7)", cutoffs=(None, 2.0))
    assert page.query.value == "patch (4, 7)"
    sent = page.canvases[1].view
    assert sent["patch"] == [4, 7] and sent["cutoff"] == 2.0
    torch.testing.assert_close(decoded(sent, "norms"), shown.views[1].norms.flatten())
    page.heads.children[1].value = True
    assert shown.state.heads == ()
    page.path.value = "/nowhere"
    assert "no images at" in page.status.value and shown.state.images == "scenes"
    page.query.value = "register 4"
    page.second.value = ""
    assert shown.state.models == ("mini-deit3",) and shown.state.query == "cls"
    assert [path.suffix for path in shown.save()] == [".png", ".svg"]


def test_an_upload_is_kept_for_batch_runs_and_a_damaged_one_refused(results):
    from PIL import Image

    shown = widgets.explore("mini-deit3", "scenes")
    buffer = io.BytesIO()
    Image.new("RGB", (120, 90), (200, 30, 30)).save(buffer, "PNG")
    shown.page._asked(0, {"kind": "upload", "name": "../my photo.png"}, [memoryview(buffer.getvalue())])
    assert shown.state.images.endswith("my_photo.png")
    assert results in Path(shown.state.images).parents
    assert shown.views[0].forward.image_name == "my_photo"
    shown.page._asked(0, {"kind": "upload", "name": "x.png"}, [memoryview(buffer.getvalue()[:60])])
    assert "x.png cannot be read as an image" in shown.page.status.value
