"""A name becomes the right model, or one clear line says why not. No network is used."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import time
import urllib.request

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from vitreg_lib import base
from vitreg_lib.base import UserError
from vitreg_lib.model import names, zoo
from vitreg_lib.model.model import Model, weights_sha256
from vitreg_lib.model.weights import file_sha256, read_weights

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALLEST = "mini-deit3-s"


def hub_folder(folder, tiny, name="vit_tiny_patch16_224", tag="made_here"):
    """A tiny model in timm's hub layout; (folder, the model)."""
    model = tiny(name, num_classes=5)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    arguments = {"depth": 2, "img_size": 32, "embed_dim": 48, "num_heads": 3}
    pretrained = {
        "tag": tag,
        "input_size": [3, 32, 32],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "crop_pct": 0.8,
        "num_classes": 5,
    }
    config = {"architecture": name, "num_classes": 5, "model_args": arguments, "pretrained_cfg": pretrained}
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture
def models(tmp_path, monkeypatch, tiny):
    """VITREG_MODELS with one tiny model, and that model."""
    model = hub_folder(tmp_path / "models" / "some_folder", tiny)
    monkeypatch.setenv("VITREG_MODELS", str(tmp_path / "models"))
    return tmp_path / "models", model


def same_outputs(loaded, expected):
    with torch.no_grad():
        return torch.equal(loaded.module(X), expected(X))


@pytest.mark.parametrize("name", [n for n, entry in zoo.entries().items() if "file" in entry])
def test_every_shipped_entry_loads_and_is_what_its_entry_says(name):
    model = zoo.load(name, "cpu")
    size = 12 if "corners" in name else 64 if "stamps" in name else 96
    role = "planted control" if name == "planted" else "trained"
    assert (model.name, model.label, model.entry, model.role, model.input_size) == (name, name, name, role, size)
    assert model.sha256 == zoo.entries()[name]["sha256"]
    assert not model.module.training
    assert not any(p.requires_grad for p in model.module.parameters())
    assert zoo.available(name) == "shipped"


@pytest.mark.parametrize("name", [n for n, entry in zoo.entries().items() if "base" in entry])
def test_a_base_is_the_same_model_without_registers(name):
    entry, plain = zoo.entries()[name], zoo.entries()[zoo.entries()[name]["base"]]
    if "file" in entry:
        model, without = zoo.load(name, "cpu"), zoo.load(entry["base"], "cpu")
        assert model.registers > without.registers == 0
        assert (model.registers_from, without.registers_from, without.base) == ("trained", "none", "")
        task = name.split("-")[1]
        assert model.family == without.family == {"corners": "emergence", "stamps": "stamped"}.get(task, task)
        rest = [{k: v.shape for k, v in m.module.state_dict().items() if k != "reg_token"} for m in (model, without)]
        assert rest[0] == rest[1]
    else:
        assert entry["family"] == plain["family"]
    if "timm" in entry:
        assert entry["timm"].replace("_reg4", "") == plain["timm"]


def test_a_twin_that_is_not_here_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("VITREG_MODELS", str(tmp_path))
    monkeypatch.setattr(names, "TWINS", tmp_path / "runs")
    assert zoo.available("vit-ti-trained-reg8") == "not here"
    with pytest.raises(UserError, match=r"`python workflow/twins.py weights --only vit-ti-trained-reg8`"):
        zoo.load("vit-ti-trained-reg8")


@pytest.mark.parametrize("name", [n for n, entry in zoo.entries().items() if "file" in entry])
def test_trained_registers_are_not_copies_of_one_another(name):
    registers = getattr(zoo.load(name, "cpu").module, "reg_token", None)
    if registers is None or registers.shape[1] < 2:
        pytest.skip("fewer than two registers")
    alike = [
        torch.dot(a, b) / (a.norm() * b.norm()) for a, b in itertools.combinations(registers[0].detach().double(), 2)
    ]
    assert max(alike) < 0.9


def test_facts_come_from_entry_metadata_or_anatomy_and_never_from_a_name(tmp_path, tiny):
    """A file whose name looks like a model with registers, of a family is none of these."""
    path = tmp_path / "mini-dinov2-reg4.safetensors"
    save_file(tiny(depth=12, img_size=224, embed_dim=192).state_dict(), path)
    model = zoo.load(f"file:{path}#vit_tiny_patch16_224", "cpu")
    assert (model.registers, model.registers_from, model.base, model.family, model.entry) == (0, "none", "", "", "")
    assert model.head == {"imagenet": (0, 1000)}
    mini = zoo.load("mini-deit3-reg4", "cpu")
    assert (mini.registers, mini.registers_from, mini.base, mini.family) == (4, "trained", "mini-deit3", "deit3")
    assert mini.head == {"shape": (0, 8), "colour": (8, 16), "texture": (16, 20), "background": (20, 24)}
    copied = tmp_path / "whatever.safetensors"
    shutil.copy(base.CHECKPOINTS / "planted.safetensors", copied)
    facts = zoo.load(f"file:{copied}", "cpu")
    assert (facts.role, facts.onset, facts.entry) == ("planted control", 5, "")
    fresh = zoo.load("random:mini-deit3-reg4", "cpu")
    assert (fresh.registers, fresh.registers_from, fresh.base) == (4, "random", "random:mini-deit3")
    assert (fresh.family, fresh.entry, fresh.role) == ("", "mini-deit3-reg4", "random control")


def test_a_name_says_how_many_registers_are_added():
    assert zoo.split("mini-deit3+ttr4") == ("mini-deit3", "ttr", 4)
    assert zoo.split("mini-deit3-reg4") == ("mini-deit3-reg4", "", 0)
    for wrong in ("mini-deit3+ttr", "mini-deit3+ttr65", "mini-deit3+ttrx"):
        with pytest.raises(UserError, match=r"write \+ttrN with N from 0 to 64, for instance mini-deit3\+ttr4"):
            zoo.split(wrong)


def test_planted_and_random_are_controls(planted):
    random = zoo.load("mini-random", "cpu")
    assert (planted.name, planted.role) == ("planted", "planted control")
    assert (random.name, random.role) == ("mini-random", "random control")
    assert planted.is_control
    assert random.is_control
    assert not zoo.load(SMALLEST, "cpu").is_control


def test_the_random_control_keeps_nothing_of_the_training():
    trained, random = zoo.load("mini-deit3", "cpu").module, zoo.load("mini-random", "cpu").module
    again = zoo.load("mini-random", "cpu").module
    fresh = type(trained)(**trained.vit_arguments).state_dict()
    for key, value in random.state_dict().items():
        assert not torch.equal(value, trained.state_dict()[key]), key
        assert torch.equal(value, again.state_dict()[key]), key
        assert value.std().item() == pytest.approx(fresh[key].std().item(), rel=0.3, abs=1e-5), key
        if value.std() == 0:  # biases at zero, scales at their constant
            assert torch.equal(value, fresh[key]), key


def test_random_names_an_architecture_of_timm():
    model = zoo.load("random:vit_tiny_patch16_224", "cpu", image_size=32)
    assert (model.name, model.role) == ("random:vit_tiny_patch16_224", "random control")
    assert model.module(X).shape == (2, 1000)
    assert model.sha256 == zoo.load("random:timm:vit_tiny_patch16_224", "cpu", image_size=32).sha256
    assert model.sha256 == zoo.load("random:vit-ti", "cpu", image_size=32).sha256


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224.made_here", "timm:vit_tiny_patch16_224.made_here", "timm:some_folder"]
)
def test_timm_names_are_found_in_vitreg_models(models, name):
    loaded = zoo.load(name, "cpu")
    assert same_outputs(loaded, models[1])
    assert (loaded.input_size, loaded.crop, loaded.interpolation) == (32, 0.8, "bilinear")
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert loaded.sha256 == file_sha256(models[0] / "some_folder" / "model.safetensors")
    assert loaded.role == "trained"


def test_an_entry_of_timm_is_found_in_vitreg_models(tmp_path, monkeypatch, tiny):
    model = hub_folder(tmp_path / "any", tiny, tag="augreg_in21k_ft_in1k")
    monkeypatch.setenv("VITREG_MODELS", str(tmp_path))
    assert zoo.available("vit-ti") == "VITREG_MODELS"
    assert same_outputs(zoo.load("vit-ti", "cpu"), model)


def test_another_input_size_can_be_asked_for(models):
    loaded = zoo.load("timm:some_folder", "cpu", image_size=64)
    assert loaded.input_size == 64
    assert loaded.capture(torch.randn(1, 3, 64, 64)).grid == (4, 4)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "folder"])
def test_file_reads_every_kind(tmp_path, tiny, suffix, wrapped):
    """With the architecture in the name where the file does not say it; wrapped as training scripts do."""
    if suffix == "folder":
        model = hub_folder(tmp_path / "mine", tiny)
        name = f"file:{tmp_path / 'mine'}"
        assert same_outputs(zoo.load(name, "cpu"), model)
        return
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32).eval()
    path = tmp_path / f"mine.{suffix}"
    state = {f"module.{k}" if wrapped and suffix != "safetensors" else k: v for k, v in model.state_dict().items()}
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "model": state} if wrapped else state, path)
    loaded = zoo.load(f"file:{path}#vit_tiny_patch16_224", "cpu", image_size=32)
    assert same_outputs(loaded, model)
    assert loaded.sha256 == file_sha256(path)


def test_a_file_of_other_classes_and_size_is_read(tmp_path):
    """A model trained on ten classes, asked for at another size: its position embeddings are interpolated."""
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=2).eval()
    save_file(model.state_dict(), tmp_path / "ten.safetensors")
    name = f"file:{tmp_path / 'ten.safetensors'}#vit_tiny_patch16_224"
    with pytest.raises(UserError, match="do not fit"):  # twelve blocks are wanted
        zoo.load(name, "cpu", image_size=64)
    whole = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10).eval()
    save_file(whole.state_dict(), tmp_path / "ten.safetensors")
    loaded = zoo.load(name, "cpu", image_size=64)
    assert loaded.module(torch.randn(1, 3, 64, 64)).shape == (1, 10)
    assert torch.equal(loaded.module.pos_embed[:, 0], whole.pos_embed[:, 0])  # cls is no place of the grid
    assert loaded.capture(torch.randn(1, 3, 64, 64)).grid == (4, 4)


def test_teachers_weights_lose_every_prefix(tmp_path, tiny):
    state = {f"module.backbone.{k}": v for k, v in tiny().state_dict().items()}
    torch.save({"teacher": state}, tmp_path / "dino.pth")
    assert set(read_weights(tmp_path / "dino.pth")[0]) == set(tiny().state_dict())


def test_images_go_to_the_device_and_precision_of_the_weights(tiny):
    """On the meta device, where an operation with a tensor of the CPU fails as it does on a GPU."""
    model = Model("any", tiny().half().to("meta"), "0" * 64)
    pixels = torch.zeros(2, 3, 4, 6)
    assert model.normalise(pixels.to("meta")).device.type == "meta"
    assert model.normalise(pixels.half()).dtype == torch.float16
    x = pixels.to(model.weights)
    assert (x.device.type, x.dtype) == ("meta", torch.float16)


def test_fresh_weights_leave_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    zoo.load("mini-random", "cpu")
    zoo.load("random:vit_tiny_patch16_224", "cpu", image_size=32)
    assert torch.equal(torch.rand(3), expected)


def test_a_file_of_this_projects_own_training_says_its_architecture():
    shipped = zoo.load(SMALLEST, "cpu")
    loaded = zoo.load(f"file:{base.CHECKPOINTS / zoo.entries()[SMALLEST]['file']}", "cpu")
    assert weights_sha256(loaded.module) == weights_sha256(shipped.module)


def refused(name: str, **options) -> str:
    with pytest.raises(UserError) as error:
        zoo.load(name, "cpu", **options)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A copy of one shipped checkpoint, where the zoo now looks."""
    name = zoo.entries()[SMALLEST]["file"]
    shutil.copy(base.CHECKPOINTS / name, tmp_path)
    for module in (zoo, names):
        monkeypatch.setattr(module, "CHECKPOINTS", tmp_path)
    zoo.load(SMALLEST, "cpu")
    return tmp_path / name


def test_a_tampered_checkpoint_is_refused(checkpoint):
    content = bytearray(checkpoint.read_bytes())
    content[-1] ^= 1
    checkpoint.write_bytes(content)
    told = refused(SMALLEST)
    assert "damaged or not the shipped one" in told
    assert zoo.entries()[SMALLEST]["sha256"][:12] in told
    assert "git checkout -- data/checkpoints" in told


def test_a_truncated_checkpoint_is_refused(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert "damaged" in refused(SMALLEST)
    assert f"{checkpoint.name} is no whole safetensors file" in refused(f"file:{checkpoint}")


def test_a_missing_checkpoint_is_named(checkpoint):
    checkpoint.unlink()
    assert f"data/checkpoints/{checkpoint.name} is not here" in refused(SMALLEST)
    assert zoo.available(SMALLEST) == "not here"


def test_controls_of_a_damaged_checkpoint_are_refused_too(tmp_path, monkeypatch):
    for name in ("mini-deit3", "planted"):
        (tmp_path / zoo.entries()[name]["file"]).write_bytes(b"nothing")
    monkeypatch.setattr(zoo, "CHECKPOINTS", tmp_path)
    assert "damaged" in refused("planted")
    assert "damaged" in refused("mini-random")
    assert "damaged" in refused("mini-random")


def test_without_a_network_it_says_which_files_to_put_where(no_models):
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert os.environ["HF_HOME"] in huggingface_hub.constants.HF_HUB_CACHE
    for name in ("timm:vit_base_patch16_224.dino", "dino-b"):
        told = refused(name)
        assert "cannot be had" in told
        assert "config.json and model.safetensors from the hub's timm/vit_base_patch16_224.dino" in told
        assert "VITREG_MODELS" in told
        assert "--profile mini" in told
    assert zoo.available("dino-b") == "not here"


def test_without_a_network_it_does_not_wait(no_models, monkeypatch):
    def unknown_host(*arguments):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    began = time.perf_counter()
    assert "cannot be had" in refused("timm:vit_tiny_patch16_384.augreg_in21k_ft_in1k")
    assert time.perf_counter() - began < 20  # the client's own retries take three quarters of a minute
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_an_unknown_name_gives_the_nearest(no_models):
    assert "did you mean mini-deit3" in refused("mini-diet3")
    assert "unknown model 'vit_tinny_patch16_224': did you mean vit_tiny" in refused("timm:vit_tinny_patch16_224")
    assert "did you mean vit_tiny_patch16_224" in refused("random:vit_tinny_patch16_224")
    assert "known: " in refused("qqqqqqq")


def test_an_unknown_tag_gives_the_known_ones(no_models):
    told = refused("vit_base_patch16_224.dinos")
    assert "did you mean" in told
    assert "vit_base_patch16_224.dino " in told or "vit_base_patch16_224.dino?" in told


@pytest.mark.parametrize("registers", ["x", "65", "", "-1"])
def test_a_bad_count_of_registers_is_refused(registers):
    assert "write +ttrN with N from 0 to 64" in refused(f"{SMALLEST}+ttr{registers}")


def test_a_folder_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("VITREG_MODELS", str(tmp_path / "none"))
    assert "none: no such folder" in refused("timm:vit_tiny_patch16_224")


def test_one_damaged_config_hides_no_other_model(tmp_path, monkeypatch, tiny):
    hub_folder(tmp_path / "some_folder", tiny)
    (tmp_path / "a_damaged_one").mkdir()
    (tmp_path / "a_damaged_one" / "config.json").write_text('{"half')
    monkeypatch.setenv("VITREG_MODELS", str(tmp_path))
    assert zoo.load("timm:vit_tiny_patch16_224.made_here").name == "vit_tiny_patch16_224.made_here"


def test_a_damaged_folder_of_the_hub_layout_is_named(models):
    folder = models[0] / "some_folder"
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "model.safetensors in some_folder cannot be read" in refused("timm:some_folder")
    (folder / "model.safetensors").unlink()
    assert "some_folder has a config.json but no model.safetensors" in refused(f"file:{folder}")
    (folder / "config.json").write_text('{"architecture": ')
    assert "config.json in some_folder cannot be read" in refused("timm:vit_tiny_patch16_224.made_here")


class Evil:
    """What a pickle can do when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    torch.save({"w": Evil(str(tmp_path / "made by the pickle"))}, tmp_path / "evil.pt")
    told = refused(f"file:{tmp_path / 'evil.pt'}#vit_tiny_patch16_224")
    assert "evil.pt cannot be read as weights only" in told
    assert not (tmp_path / "made by the pickle").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (torch.zeros(3), "holds no weights by name"),
        ([1, 2], "holds no weights by name"),
        ({"epoch": 3}, "holds no weights by name"),
        ({"blocks.0.norm1.weight": torch.zeros(3)}, "size mismatch"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, content, told):
    torch.save(content, tmp_path / "other.pt")
    assert told in refused(f"file:{tmp_path / 'other.pt'}#vit_tiny_patch16_224", image_size=32)


def test_a_truncated_pickle_is_refused(tmp_path, tiny):
    torch.save(tiny().state_dict(), tmp_path / "half.pth")
    whole = (tmp_path / "half.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    assert "half.pth cannot be read as weights only" in refused(f"file:{tmp_path / 'half.pth'}#vit_tiny_patch16_224")


def test_weights_that_do_not_fit_are_refused(tmp_path, tiny):
    state = tiny().state_dict()  # 48 wide, where the architecture is 192
    save_file(state, tmp_path / "narrow.safetensors")
    told = refused(f"file:{tmp_path / 'narrow.safetensors'}#vit_tiny_patch16_224", image_size=32)
    assert "the weights do not fit the architecture: " in told
    whole = timm.create_model("vit_tiny_patch16_224", img_size=32).state_dict()
    whole["extra.weight"] = torch.zeros(2)
    del whole["norm.bias"]
    save_file(whole, tmp_path / "other.safetensors")
    told = refused(f"file:{tmp_path / 'other.safetensors'}#vit_tiny_patch16_224", image_size=32)
    assert "norm.bias, extra.weight; their names begin blocks.0." in told


def test_a_classifier_that_is_missing_is_no_fault(tmp_path):
    whole = timm.create_model("vit_tiny_patch16_224", img_size=32).state_dict()
    save_file({k: v for k, v in whole.items() if not k.startswith("head")}, tmp_path / "trunk.safetensors")
    zoo.load(f"file:{tmp_path / 'trunk.safetensors'}#vit_tiny_patch16_224", "cpu", image_size=32)


def test_a_file_of_unknown_architecture_says_how_to_name_it(tmp_path, tiny):
    path = tmp_path / "mine.safetensors"
    save_file(tiny().state_dict(), path)
    assert f"no usual one is like it: write file:{path}#ARCH" in refused(f"file:{path}")
    assert "no such file" in refused(f"file:{tmp_path / 'none.pt'}")
    (tmp_path / "mine.bin").write_bytes(b"")
    assert "mine.bin holds no weights: neither" in refused(f"file:{tmp_path / 'mine.bin'}")


def test_the_digest_of_weights_sees_names_shapes_types_and_values(tiny):
    one, other = tiny(seed=0), tiny(seed=1)
    assert weights_sha256(one) == weights_sha256(tiny(seed=0))
    assert weights_sha256(one) != weights_sha256(other)
    assert weights_sha256(one) != weights_sha256(tiny(seed=0).half())


def test_shipped_weights_are_small_and_in_half_precision():
    """But the planted control: its numbers are to stay what they were before it was a file."""
    for name, entry in zoo.entries().items():
        if "file" in entry:
            state = load_file(base.CHECKPOINTS / entry["file"])
            assert {v.dtype for v in state.values()} == {torch.float32 if name == "planted" else torch.float16}
            assert all(v.isfinite().all() for v in state.values())
