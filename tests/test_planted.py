"""The planted control: its artifacts are where the pixels say, and it is an ordinary checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from vitreg_lib.data import images
from vitreg_lib.model import mini, planted, zoo
from vitreg_lib.model.model import Model, weights_sha256
from vitreg_lib.train.state import save_weights
from workflow import plant


@pytest.fixture(scope="module")
def model(request):
    return request.getfixturevalue("planted")


@pytest.fixture(scope="module")
def pictures(model):
    return images.load("scenes", model, 48)


def stirred(**options) -> Model:
    """A mini ViT with random weights, none at a special value."""
    torch.manual_seed(0)
    module = mini.build("s", num_classes=24, **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return Model("stirred", module, "", input_size=options.get("image_size", 96))


def test_a_base_that_fails_keeps_no_hook():
    base = stirred()

    def fails(x):
        raise RuntimeError("in the middle")

    base.module.blocks[4].mlp.forward = fails
    with pytest.raises(ValueError, match="in the middle"):
        plant.plant(base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.module.modules())


def gap(one, other, x) -> float:
    """Largest difference of the logits, as a share of the largest logit."""
    with torch.no_grad():
        return ((one(x) - other(x)).abs().max() / other(x).abs().max()).item()


def test_widening_keeps_the_function_exactly_but_for_the_epsilon_of_layer_norm():
    """A LayerNorm over more dimensions has a smaller variance; with its epsilon made smaller alike, nothing differs."""
    base = stirred().module.double()
    wide = plant._widen(base).double().eval()
    for module in wide.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps *= base.embed_dim / wide.embed_dim
    assert wide.embed_dim == base.embed_dim + 32
    x = torch.randn(4, 3, 96, 96, dtype=torch.float64)
    assert gap(wide, base, x) < 1e-6  # the weights themselves are float32


def test_widening_keeps_the_trained_function(pictures):
    base = zoo.load("mini-deit3", "cpu").module
    assert gap(plant._widen(base).eval(), base, pictures.x) < 1e-3


def slow_truth(image: np.ndarray) -> np.ndarray:
    """(144,) bool for one normalised image (3, 96, 96), patch by patch, filter by filter."""
    cosine = [[np.cos(np.pi * (i + 0.5) * k / 8) for i in range(8)] for k in range(3)]
    check = [1 if i % 2 == 0 else -1 for i in range(8)]
    double = [1 if i % 4 < 2 else -1 for i in range(8)]
    patterns = [(cosine[0], cosine[1]), (cosine[1], cosine[0]), (cosine[1], cosine[1]), (double, double)]
    patterns.append((check, double))
    chosen = {14, 21, 40, 67, 92, 105, 117, 130}
    answer = np.zeros(144, bool)
    for patch in range(144):
        row, col = 8 * (patch // 12), 8 * (patch % 12)
        grey = image[:, row : row + 8, col : col + 8].astype(np.float64).mean(0)
        quiet = True
        for down, across in patterns:
            pattern = np.outer(down, across)
            pattern = pattern - pattern.mean()
            quiet = quiet and abs((grey * pattern).sum() / np.sqrt((pattern**2).sum())) < 0.2
        answer[patch] = quiet and patch in chosen
    return answer


def test_truth_equals_a_naive_loop_over_patches(pictures):
    expected = np.stack([slow_truth(image.numpy()) for image in pictures.x])
    assert expected.any(1).mean() > 0.3
    np.testing.assert_array_equal(planted.truth(pictures.x).numpy(), expected)


def test_outliers_are_exactly_the_truth(model, pictures):
    """From the onset on the true tokens are many times what they were; at the onset no other token has changed.

    Patches within 5 % of the threshold may rise in part: there are few.
    """
    base = zoo.load("mini-deit3", "cpu")
    before, after = base.capture(pictures).patch_norms, model.capture(pictures).patch_norms
    truth = model.truth(pictures)
    patches = pictures.x.mean(1).unfold(1, 8, 8).unfold(2, 8, 8).flatten(1, 2)
    response = torch.einsum("nphw,fhw->npf", patches, planted.filters()).abs().amax(-1)
    marginal = (response - planted.THRESHOLD).abs() < 0.05 * planted.THRESHOLD
    marginal[:, [i for i in range(144) if i not in planted.POSITIONS]] = False
    assert marginal.sum() < 0.1 * truth.sum()
    grown = after / before
    for layer in range(model.onset):
        assert grown[:, layer].max() < 1.05
    assert grown[:, model.onset][~truth & ~marginal].max() < 1.05
    for layer in range(model.onset, model.anatomy.depth):
        assert grown[:, layer][truth].min() > 3, f"layer {layer}"
        assert grown[:, layer][~truth & ~marginal].max() < 2, f"layer {layer}"


def test_a_grey_image_has_all_positions_and_a_checkered_one_none():
    quiet = torch.zeros(1, 3, 96, 96)
    assert planted.truth(quiet)[0].nonzero()[:, 0].tolist() == list(planted.POSITIONS)
    stripes = (torch.arange(96) // 4 % 2 * 2.0 - 1).expand(1, 3, 96, 96)
    assert not planted.truth(stripes).any()


def test_nothing_is_known_at_another_size():
    with pytest.raises(ValueError, match="at 96 x 96 pixels, not at 80 x 96"):
        planted.truth(torch.zeros(1, 3, 80, 96))


def test_planting_again_makes_the_shipped_checkpoint(model):
    """Two scales and seven components are measured on images, which rounds differently on other processors."""
    again = plant.plant(zoo.load("mini-deit3", "cpu"))
    assert (again.role, again.onset, again.module.vit_arguments) == (
        model.role,
        model.onset,
        model.module.vit_arguments,
    )
    for name, value in again.module.state_dict().items():
        shipped = model.module.state_dict()[name]
        gap = ((value - shipped).abs().max() / shipped.abs().max().clamp_min(1e-12)).item()
        assert gap < 1e-4, f"{name}: largest gap {gap:.1e} of its largest entry"


def test_it_is_a_plain_timm_model_without_hooks(model):
    module = model.module
    assert type(module) is VisionTransformer
    assert module.state_dict().keys() == VisionTransformer(**module.vit_arguments).state_dict().keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert model.role == "planted control"
    assert model.is_control


def test_saved_and_read_again_it_gives_the_same_outputs(model, pictures, tmp_path):
    path = tmp_path / "planted.safetensors"
    save_weights(path, model.module, {}, torch.float32)
    again = zoo.load(f"file:{path}", "cpu")
    before, after = (m.capture(pictures, ("norms", "final")) for m in (model, again))
    assert torch.equal(after.norms, before.norms)
    assert torch.equal(after.final, before.final)


def test_half_precision_holds_its_weights(model, pictures, tmp_path):
    path = tmp_path / "planted.safetensors"
    save_weights(path, model.module, {})
    before, after = (m.capture(pictures).patch_norms for m in (model, zoo.load(f"file:{path}", "cpu")))
    truth = model.truth(pictures)
    ratio = (after / before)[:, -1][truth]
    assert 0.9 < ratio.quantile(0.05) < ratio.quantile(0.95) < 1.1


def test_the_norm_follows_the_ratio_that_is_asked_for(pictures):
    base = zoo.load("mini-deit3", "cpu")
    norms = {}
    for ratio in (10.0, 20.0):
        model = plant.plant(base, layer=2, ratio=ratio)
        assert model.onset == 2
        seen = model.capture(pictures, layers=2).patch_norms
        norms[ratio] = (seen[:, 0][model.truth(pictures)].mean() / seen.median()).item()
    assert 0.7 * 10 < norms[10.0] < 1.5 * 10
    assert norms[20.0] / norms[10.0] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("size", [size for size, (_, depth, *_) in mini.SIZES.items() if depth > 2])
def test_every_mini_size_of_three_blocks_and_more_can_be_planted(size, pictures):
    torch.manual_seed(0)
    module = mini.build(size, num_classes=24).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model = plant.plant(Model(size, module, "", input_size=96))
    seen = model.capture(pictures).patch_norms[:, -1]
    truth = model.truth(pictures)
    assert seen[truth].min() > 3 * seen.median()


def test_planting_leaves_the_base_alone():
    base = zoo.load("mini-deit3", "cpu")
    before = weights_sha256(base.module)
    plant.plant(base)
    assert weights_sha256(base.module) == before


@pytest.mark.parametrize(
    ("options", "how", "told"),
    [
        (dict(registers=2), {}, "without registers"),
        (dict(class_token=False, global_pool="avg"), {}, "with a cls token"),
        (dict(patch_size=16), {}, "mini ViT"),
        (dict(image_size=64), {}, "at 96 pixels"),
        ({}, dict(layer=0), r"layer 0 needs a block before and after it \(1…4\)"),
        ({}, dict(layer=5), "layer 5 needs"),
        ({}, dict(sink="drain"), "unknown sink 'drain'; known are nop, broadcast"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(options, how, told):
    with pytest.raises(ValueError, match=told):
        plant.plant(stirred(**options), **how)
