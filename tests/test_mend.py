"""Registers at test time: found on the planted control, no fault of the released code, real weights."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_time_registers
import timm
import torch

import vitreg_lib as vr
from vitreg_lib import cli
from vitreg_lib.base import UserError
from vitreg_lib.data import images, scenes
from vitreg_lib.hooks.anatomy import layer_scale
from vitreg_lib.hooks.capture import capture
from vitreg_lib.model import added, mend, mini, planted, saved, zoo
from vitreg_lib.model.model import Model, weights_sha256
from workflow import plant

REAL = Path(os.environ.get("VITREG_MODELS") or Path(__file__).resolve().parents[2] / "shared" / "real")


@pytest.fixture(scope="module")
def control():
    """A planted control on a random mini ViT: no trained weights are needed to know where its artifacts are."""
    torch.manual_seed(0)
    base = Model("random-mini", mini.build("m").eval().requires_grad_(False), "0" * 64, input_size=96)
    return plant.plant(base)


@pytest.fixture(scope="module")
def pictures(control):
    return control.normalise(scenes.render(range(24)).pixels)


@pytest.fixture(scope="module")
def found(control, pictures):
    return mend.find(control, pictures)


def test_a_search_is_kept_for_the_same_weights_alone(control, results, monkeypatch):
    first = mend.with_test_time_registers(control, 1)
    searched, find = [], mend.find
    monkeypatch.setattr(mend, "find", lambda *given: searched.append(given) or find(*given))
    again = mend.with_test_time_registers(control, 2)
    assert not searched and again.about.partition("time, ")[2] == first.about.partition("time, ")[2]
    other = copy.deepcopy(control)
    with torch.no_grad():
        other.module.blocks[-1].mlp.fc2.bias.add_(1e-3)
    mend.with_test_time_registers(other, 1)
    assert len(searched) == 1


def outlier_share(model, x, cutoff):
    return (model.capture(x, layers=-1).patch_norms > cutoff).float().mean().item()


def test_the_planted_neurons_are_found(found, control):
    """The truth: one neuron writes the norm and 14 the content, in the block where the artifacts begin."""
    first = control.module.blocks[5].mlp.fc1.out_features - 8 * 16
    assert found.onset == 5 and found.neurons[0] == (5, first)
    assert set(found.neurons) == {(5, first + i) for i in range(15)}


def test_outliers_leave_the_patches_and_the_registers_take_them(found, control, pictures):
    before = outlier_share(control, pictures, found.cutoff)
    mended = mend.with_test_time_registers(control, 2, found.neurons)
    seen = mended.capture(pictures)
    assert before > 0.01
    assert (seen.patch_norms[:, -1] > found.cutoff).float().mean() < 0.1 * before
    has_outlier = planted.truth(pictures).any(1)
    assert seen.register_norms[has_outlier, -1].min() > found.cutoff


def test_every_image_of_a_batch_is_treated_as_if_alone(found, control, pictures):
    mended = added.add_registers(control.module, found.neurons, 2)
    together = capture(mended, pictures[:8], "tokens", layers=-1).tokens[7]
    alone = torch.cat([capture(mended, x[None], "tokens", layers=-1).tokens[7] for x in pictures[:8]])
    gap = (together - alone).abs().max() / alone.abs().max()
    assert gap < 1e-5, f"largest relative gap between batch 8 and batch 1: {gap:.1e}"


def test_each_neuron_has_its_own_largest_value_and_cls_neither_counts_nor_changes():
    activations = torch.zeros(2, 2 + 1 + 3, 4)  # cls, an old register, one new token, three patches
    activations[0, 3:, 0] = torch.tensor([1.0, 5.0, 2.0])
    activations[0, 3:, 1] = torch.tensor([0.5, 0.1, -3.0])
    activations[1, 3:, 0] = torch.tensor([7.0, 0.0, 0.0])
    activations[:, :2, :2] = 99.0
    activations[:, :, 3] = 4.0
    original = activations.clone()
    moved = added.move(activations, torch.tensor([True, True, False, False]), old=2, n=1)
    assert moved[0, 2, :2].tolist() == [5.0, -3.0] and moved[1, 2, :2].tolist() == [7.0, 0.0]
    assert (moved[:, 3:, :2] == 0).all(), "patches keep nothing of the chosen neurons"
    assert (moved[:, :2] == 99.0).all(-1)[..., None].logical_or(moved[:, :2] == original[:, :2]).all()
    assert torch.equal(moved[:, :, 2:], original[:, :, 2:]) and torch.equal(activations, original)


def test_with_several_blocks_new_tokens_keep_what_they_hold():
    activations = torch.zeros(1, 1 + 1 + 2, 1)
    activations[0, 1, 0], activations[0, 2, 0] = 9.0, 2.0  # the new token itself fires most
    moved = added.move(activations, torch.tensor([True]), old=1, n=1)
    assert moved[0, :, 0].tolist() == [0, 9.0, 0, 0]


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_returned_features_drop_the_new_tokens_and_no_patch(pool):
    torch.manual_seed(0)
    model = mini.build("xs", registers=2, global_pool=pool).eval()
    x = torch.randn(2, 3, 96, 96)
    mended = added.add_registers(model, [], 3)
    assert mended.num_prefix_tokens == 6 and mended.forward_features(x).shape[1] == 6 + 144
    patches, prefix = mended.forward_intermediates(x, indices=[-1], return_prefix_tokens=True)[1][0]
    assert patches.shape[-2:] == (12, 12) and prefix.shape[1] == 6
    seen = capture(mended, x, ("norms", "final"))
    assert (seen.num_registers, seen.has_cls, seen.patch_norms.shape[-1]) == (5, True, 144)
    silent = added.add_registers(model, [], 3)
    for attn in (block.attn for block in silent.blocks):
        attn.proj.weight.data.zero_()  # without attention new tokens cannot matter: outputs are the old ones
    plain = mini.build("xs", registers=2, global_pool=pool).eval()
    plain.load_state_dict(added.of_state(silent.state_dict())[1])
    assert torch.allclose(plain(x), silent(x), atol=1e-5)


def test_the_original_is_left_as_it_was(found, control, pictures):
    before, digest = control.module(pictures[:2]), weights_sha256(control.module)
    prefix, kind = control.module.num_prefix_tokens, type(control.module)
    mended = mend.with_test_time_registers(control, 4, found.neurons)
    mended.module(pictures[:2])
    mended.module.cls_token.data.add_(1)
    assert torch.equal(control.module(pictures[:2]), before) and weights_sha256(control.module) == digest
    assert control.module.num_prefix_tokens == prefix and type(control.module) is kind
    assert not any(m._forward_pre_hooks for m in control.module.modules())


def test_a_model_in_training_with_a_frozen_part_is_left_so(control, pictures):
    module = copy.deepcopy(control.module).train()
    module.blocks[2].eval()
    modes = [m.training for m in module.modules()]
    is_outlier = torch.zeros(4, 144, dtype=torch.bool)
    is_outlier[:, 14] = True
    table = mend.rank(module, pictures[:4], is_outlier, [1, 2])
    assert [m.training for m in module.modules()] == modes
    assert table.columns.tolist() == ["block", "neuron", "at_outliers", "elsewhere", "writes"]
    assert table.writes.is_monotonic_decreasing and set(table.block) == {1, 2}


def test_zero_registers_only_silence_the_neurons(found, control, pictures):
    silenced = mend.with_test_time_registers(control, 0, found.neurons)
    assert silenced.anatomy.num_registers == 0 and silenced.name.endswith("+ttr0")
    assert outlier_share(silenced, pictures, found.cutoff) < 0.1 * outlier_share(control, pictures, found.cutoff)


def test_random_neurons_of_equal_activation_mend_nothing(found, control, pictures):
    drawn = test_time_registers.random_neurons(control, found.neurons, pictures, seed=3)
    assert len(drawn) == len(set(drawn)) == len(found.neurons) and not set(drawn) & set(found.neurons)
    assert {b for b, _ in drawn} == {b for b, _ in found.neurons}
    mended = mend.with_test_time_registers(control, 1, drawn)
    assert outlier_share(mended, pictures, found.cutoff) > 0.5 * outlier_share(control, pictures, found.cutoff)


def test_role_name_and_digest_say_what_it_is(found, control):
    one, two = (mend.with_test_time_registers(control, n, found.neurons) for n in (1, 2))
    assert one.role == "mended" and one.name == control.name + "+ttr1" and one.anatomy.num_registers == 1
    assert len({control.sha256, one.sha256, two.sha256}) == 3 and len(one.sha256) == 64


def test_a_clean_model_has_nothing_to_mend():
    torch.manual_seed(0)
    clean = Model("clean", mini.build("xs").eval(), "0" * 64, input_size=96)
    with pytest.raises(mend.NothingToMend, match="nothing to mend"):
        mend.with_test_time_registers(clean, 4)


def test_attention_bias_by_pairs_of_places_is_refused():
    beit = timm.create_model("beit_base_patch16_224", img_size=64, depth=1, embed_dim=96, num_heads=3)
    with pytest.raises(UserError, match="bias for each pair"):
        added.add_registers(beit, [], 1)


@pytest.mark.parametrize("neurons, named", [([(9, 0)], "block 9"), ([(0, 64)], "neuron 64")])
def test_neurons_that_do_not_exist_are_refused(neurons, named):
    with pytest.raises(ValueError, match=named):
        added.add_registers(mini.build("xs"), neurons, 1)


def test_layer_scale_is_found_under_both_names():
    options = {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 3}
    vit, eva, plain = (
        timm.create_model(name, **options).blocks[0]
        for name in ("deit3_small_patch16_224", "vit_small_patch16_dinov3", "vit_tiny_patch16_224")
    )
    assert layer_scale(vit, 1) is vit.ls1.gamma and layer_scale(vit, 2) is vit.ls2.gamma
    assert layer_scale(eva, 1) is eva.gamma_1 and layer_scale(eva, 2) is eva.gamma_2
    assert layer_scale(plain, 1) is layer_scale(plain, 2) is None


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_rotary_embeddings_keep_their_places(name):
    """Zero tokens whose attention output is cut leave every other token as it was, rotary embedding included."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=56 if "14" in name else 64, depth=2).eval()
    x = torch.randn(1, 3, *model.patch_embed.img_size)
    mended = added.add_registers(model, [(1, 3)], 2)
    old = model.num_prefix_tokens
    q, k = (capture(m, x, ("q", "k"), layers=0) for m in (model, mended))
    assert torch.allclose(k.q[0][:, :, old + 2 :], q.q[0][:, :, old:], atol=1e-5)
    assert torch.allclose(k.k[0][:, :, old + 2 :], q.k[0][:, :, old:], atol=1e-5)
    assert mended(x).shape == model(x).shape


def test_other_image_sizes_still_work():
    model = mini.build("xs", no_embed_class=False)
    mended = added.add_registers(model, [], 2).eval()
    assert mended.forward_features(torch.randn(1, 3, 64, 96)).shape[1] == 3 + 8 * 12


FRESH = """
import sys, torch, vitreg_lib as vr
model = vr.load(sys.argv[1], "cpu")
x = torch.load(sys.argv[2])
torch.save((model.module(x), model.registers, model.role, model.label), sys.argv[3])
"""


def test_a_saved_mend_is_loaded_by_name_in_a_fresh_process(found, control, pictures, tmp_path):
    mended = mend.with_test_time_registers(control, 3, found.neurons)
    saved.write(mended, tmp_path / "mended.safetensors")
    state = mended.module.state_dict()
    assert state["blocks.0.added_registers"].shape == (3, control.module.embed_dim)
    moved = state["blocks.5.mlp.fc2.moved_neurons"].nonzero().flatten().tolist()
    assert moved == sorted(neuron for block, neuron in found.neurons)
    assert set(state) - {"blocks.0.added_registers", "blocks.5.mlp.fc2.moved_neurons"} == set(
        control.module.state_dict()
    )
    torch.save(pictures[:3], tmp_path / "x.pt")
    name, said = f"file:{tmp_path}/mended.safetensors", tmp_path / "said.pt"
    subprocess.run([sys.executable, "-c", FRESH, name, tmp_path / "x.pt", said], check=True)
    answers, registers, role, label = torch.load(said)
    assert (registers, role, label) == (3, "mended", name)
    with torch.no_grad():
        assert torch.equal(answers, mended.module(pictures[:3]))


def test_a_mended_module_is_copied_and_pickled_whole(found, control, pictures, tmp_path):
    mended = mend.with_test_time_registers(control, 3, found.neurons).module
    torch.save(mended, tmp_path / "whole.pt")
    for again in (torch.load(tmp_path / "whole.pt", weights_only=False), copy.deepcopy(mended)):
        assert type(again) is type(mended) and again is not mended
        assert again.num_prefix_tokens == control.anatomy.num_prefix_tokens + 3
        assert list(again.state_dict()) == list(mended.state_dict())
        with torch.no_grad():
            assert torch.equal(again(pictures[:2]), mended(pictures[:2]))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "deit3_small_patch16_224"])
def test_timms_own_functions_and_files_know_the_added_registers(name, tmp_path):
    torch.manual_seed(0)
    sizes = dict(img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=5)
    module = timm.create_model(name, **sizes).eval()
    for parameter in module.parameters():  # timm starts with weights of 0.02, where nothing matters
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    module.timm_config = {"model_args": {k: v for k, v in sizes.items() if k != "num_classes"}}
    mended = mend.with_test_time_registers(vr.load(module), 2, [(1, 7)])
    x = torch.randn(2, 3, 64, 64)
    saved.write(mended, tmp_path / "m.safetensors")
    again = zoo.load(f"file:{tmp_path}/m.safetensors", "cpu").module
    torch.save(mended.module.state_dict(), tmp_path / "m.pth")  # without metadata: the buffers alone say it
    with torch.no_grad():
        assert torch.equal(again(x), mended.module(x)) and not torch.allclose(again(x), module(x), atol=1e-4)
        tokens = again.forward_features(x)
        assert tokens.shape == (2, module.num_prefix_tokens + 2 + 16, 48)
        final, maps = again.forward_intermediates(x, indices=[1], norm=True)
        torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), tokens[:, module.num_prefix_tokens + 2 :])
        torch.testing.assert_close(final, tokens)
    said, weights = added.of_state(torch.load(tmp_path / "m.pth"))
    module.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(added.with_additions(module, said)(x), mended.module(x))
    with pytest.raises(UserError, match="belongs to no part of this"):
        added.with_additions(mini.build("xxs"), {"blocks.7.mlp.fc2.moved_neurons": torch.ones(3, dtype=torch.bool)})


def test_removed_directions_are_saved_and_loaded_by_name(tmp_path):
    """mini-corners' outliers are bound to their place: without one direction few are left, in a file too."""
    before, mended = zoo.load("mini-corners", "cpu"), zoo.load("mini-corners+minus1", "cpu")
    x, cutoff = images.load("textures", before, 16, seed=3).x, vr.detect(before, mend.handful(before).x).outliers.cutoff
    assert mended.role == "mended" and mended.registers == 0 and mended.sha256 != before.sha256
    assert outlier_share(mended, x, cutoff) < 0.2 * outlier_share(before, x, cutoff)
    saved.write(mended, tmp_path / "m.safetensors")
    again = zoo.load(f"file:{tmp_path}/m.safetensors", "cpu")
    assert again.role == "mended" and again.registers_from == "none"
    assert "blocks.2.removed_directions" in again.module.state_dict()
    assert torch.equal(again.capture(x).norms, mended.capture(x).norms)
    with pytest.raises(UserError, match="mended already"):
        mend.with_test_time_registers(again, 2, [(0, 1)])
    with pytest.raises(UserError, match="no block follows block"):
        mend.without_directions(before, 1, x, before.anatomy.depth - 1)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("kind", ["mini", "eva"])
def test_a_mended_model_is_exported_for_any_number_of_images(kind, suffix, tmp_path):
    """`saved.export` runs the program on one image and on three, and compares; here on five, apart from it."""
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    eva = dict(img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=5)
    module = mini.build("xxs") if kind == "mini" else timm.create_model("vit_small_patch16_dinov3", **eva)
    model = mend.with_test_time_registers(vr.load(module.eval()), 2, [(0, 1), (1, 7)])
    model.input_size = 96 if kind == "mini" else 64
    saved.write(model, tmp_path / f"m{suffix}")
    x = torch.randn(5, 3, model.input_size, model.input_size)
    if suffix == ".onnx":
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
        said = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    else:
        said = torch.export.load(tmp_path / "m.pt2").module()(x)
    with torch.no_grad():
        torch.testing.assert_close(said, model.module(x), rtol=1e-3, atol=1e-4)


def test_the_command_mends_saves_and_says_what_it_costs_elsewhere(tmp_path, capsys):
    """mini-corners: three neurons make its outliers (docs/log.md); a model without outliers is no error."""
    assert cli.main(["mend", "mini-corners", "--save", str(tmp_path / "m.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "20 to search, the others to try" in said and "features_apart" in said
    mended = zoo.load(f"file:{tmp_path}/m.safetensors", "cpu")
    assert mended.role == "mended" and mended.base == "mini-corners" and mended.about in said
    before = zoo.load("mini-corners", "cpu")
    found = mend.find(before)
    x = images.load("textures", before, 16, seed=3).x
    assert outlier_share(before, x, found.cutoff) > 0.02 > 5 * outlier_share(mended, x, found.cutoff)
    assert cli.main(["mend", "mini-deit3-xs", "--save", str(tmp_path / "no.safetensors")]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "has nothing to mend" in said and not (tmp_path / "no.safetensors").exists()


@pytest.fixture
def vit_ti(monkeypatch):
    if not (REAL / "vit_tiny_patch16_224.augreg_in21k_ft_in1k").is_dir():
        pytest.skip("real weights (vit_tiny_patch16_224.augreg_in21k_ft_in1k) are not on this machine")
    monkeypatch.setenv("VITREG_MODELS", str(REAL))
    return zoo.load("vit-ti", "cpu")


def test_real_vit_ti_is_mended_by_one_neuron(vit_ti):
    found = mend.find(vit_ti)
    assert found.neurons == ((7, 417),) and found.onset == 7
    assert 0.015 < found.share_before < 0.025 and found.share_after == 0
    x = mend.handful(vit_ti).x
    norms = mend.with_test_time_registers(vit_ti, 4, found.neurons).capture(x, layers=-1).register_norms
    assert 450 < norms.mean() < 600, f"mean register norm {norms.mean():.0f}"


def test_real_deit_ti_is_mended_by_a_few_neurons_before_and_at_the_onset(vit_ti):
    found = mend.find(zoo.load("deit-ti", "cpu"))
    assert 2 <= len(found.neurons) <= 10 and {block for block, _ in found.neurons} <= set(range(4, 9))
    assert (found.layer, found.onset) == (11, 8)
    assert 0.04 < found.share_before < 0.06 and found.share_after < 0.1 * found.share_before


def test_real_dinov2_s_has_nothing_to_mend(vit_ti):
    with pytest.raises(mend.NothingToMend, match="nothing to mend: no second mode"):
        mend.find(zoo.load("dinov2-s", "cpu"))


def test_hidden_states_of_transformers_are_those_of_the_tokens_that_were_there():
    """A DPT's backbone and LLaVA read them: one token more would shift every patch."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8)
    torch.manual_seed(0)
    for kind, more in (("CLIPVision", {"intermediate_size": 64}), ("Dinov2", {})):
        config = getattr(transformers, f"{kind}Config")(**sizes, **more)
        mended = mend.with_added(zoo.load(getattr(transformers, f"{kind}Model")(config).eval()), "ttr", 2, [(0, 3)])
        x = torch.randn(2, 3, 32, 32)
        tokens = mended.capture(x, "tokens").tokens
        with torch.no_grad():
            states = mended.module(x, output_hidden_states=True).hidden_states
        assert {state.shape[1] for state in states} == {17}
        kept = [0, *range(3, 19)]
        torch.testing.assert_close(states[1], tokens[0][:, kept])
        torch.testing.assert_close(states[2], tokens[1][:, kept])
    backbone = transformers.Dinov2Backbone(transformers.Dinov2Config(**sizes, out_features=["stage1", "stage3"])).eval()
    with torch.no_grad():
        maps = mend.with_added(zoo.load(backbone), "empty", 2).module(x).feature_maps
    assert [each.shape for each in maps] == [(2, 48, 4, 4)] * 2
