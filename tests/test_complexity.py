"""The cost of registers: formula against torch's flop counter, numbers by hand, and the measurement on this machine."""

import fig12
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

BY_HAND = {  # protocols, Figure 12: percent at 4 and 16 registers, blocks only
    ("l", 14, 224): (1.62, 6.49),
    ("g", 14, 224): (1.60, 6.41),
    ("b", 14, 224): (1.64, 6.58),
    ("b", 16, 224): (2.12, 8.48),
    ("l", 14, 518): (0.35, 1.38),
}


@pytest.mark.parametrize("model", BY_HAND, ids=str)
def test_percent_by_hand(model):
    table = fig12.cost_table([model]).set_index("registers")
    measured = tuple(table.flops_percent[[4, 16]].round(2))
    assert measured == BY_HAND[model]
    assert table.flops_percent[0] == 0 and table.params_percent[16] < 0.1


def test_the_papers_bounds_hold_at_patch_14_and_break_at_patch_16():
    table = fig12.cost_table(BY_HAND, registers=[4]).set_index(["arch", "patch", "resolution"]).flops_percent
    assert (table.xs(14, level="patch") < 2).all() and (table.xs(16, level="patch") > 2).all()


@pytest.mark.parametrize("arch", fig12.SIZES)
@pytest.mark.parametrize("patch, resolution, num_registers, num_classes", [(14, 224, 4, 0), (16, 64, 0, 1000)])
def test_formula_equals_torchs_flop_counter(arch, patch, resolution, num_registers, num_classes):
    model = fig12.build_vit(arch, patch, resolution, num_registers, num_classes)
    found = fig12.counted(model, resolution)
    assert found["params"] == fig12.count_params(arch, patch, resolution, num_registers, num_classes)
    assert found["flops"] == 2 * fig12.count_macs(
        arch, patch, resolution, num_registers, whole=True, num_classes=num_classes
    )


@pytest.mark.parametrize(
    "arch, name",
    [("ti", "vit_tiny_patch16_224"), ("b", "vit_base_patch14_reg4_dinov2"), ("g", "vit_giant_patch14_dinov2")],
)
def test_sizes_are_those_of_timms_named_models(arch, name):
    import timm

    patch = 14 if "patch14" in name else 16
    named = timm.create_model(name, img_size=224, num_classes=0, device="meta", no_embed_class=True)
    registers = getattr(named, "num_reg_tokens", 0)
    layer_scale = sum(p.numel() for n, p in named.named_parameters() if n.endswith("gamma"))
    assert layer_scale == (2 * named.embed_dim * len(named.blocks) if "dinov2" in name else 0)
    ours, theirs = fig12.counted(fig12.build_vit(arch, patch, 224, registers), 224), fig12.counted(named, 224)
    assert theirs == {"params": ours["params"] + layer_scale, "flops": ours["flops"]}


def test_registers_add_only_their_own_parameters():
    bare, four = (fig12.counted(fig12.build_vit("s", 16, 224, n), 224)["params"] for n in (0, 4))
    assert four - bare == 4 * 384


@settings(max_examples=50, deadline=None)
@given(
    arch=st.sampled_from(list(fig12.SIZES)),
    patch=st.integers(4, 32),
    side=st.integers(1, 40),
    num_registers=st.integers(0, 32),
)
def test_increase_is_the_block_formula(arch, patch, side, num_registers):
    d, depth = fig12.SIZES[arch].embed_dim, fig12.SIZES[arch].depth
    before, after = side**2 + 1, side**2 + 1 + num_registers
    by_hand = depth * (12 * d * d * num_registers + 2 * d * (after**2 - before**2))
    for whole in (False, True):  # embedding and head do not see registers
        macs = [fig12.count_macs(arch, patch, side * patch, n, whole=whole) for n in (0, num_registers)]
        assert macs[1] - macs[0] == by_hand
    linear = [fig12.count_macs(arch, patch, side * patch, n, attention=False) for n in (0, num_registers)]
    assert linear[1] * before == linear[0] * after  # proportional to the tokens


def test_table_has_a_row_per_model_and_count():
    table = fig12.cost_table([("ti", 16, 224), ("b", 16, 32)], registers=[0, 1], whole=True, num_classes=10)
    assert list(table.tokens) == [197, 198, 5, 6]
    assert list(table.columns)[:4] == ["arch", "patch", "resolution", "registers"]


def test_measured_cost_on_this_machine():
    state = torch.random.get_rng_state()
    table = fig12.measure_cost("ti", 16, 64, registers=(0, 4), batch_size=2, rounds=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (table.seconds > 0).all() and table.seconds_percent[0] == 0 and table.peak_percent[0] == 0
    assert table.peak_mib[1] > table.peak_mib[0]
    assert list(table.registers) == [0, 4] and set(table.batch_size) == {2}


def test_peak_counts_tensors_alive_at_once():
    class Chain(torch.nn.Module):
        def forward(self, x):
            x = x + 1  # one new tensor
            y = x.view(-1).mul(2)  # two alive; the view is not one
            x = None
            return y + 1  # two alive: y and the result

    images = torch.zeros(1, 3, 16, 16)
    assert fig12.peak_bytes(Chain(), images) == 2 * images.nbytes


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="unknown size 'xl': one of ti, s, b, l, g"):
        fig12.count_macs("xl", 14, 224)
    with pytest.raises(ValueError, match="resolution 225 is not a multiple of patch 14; nearest: 224"):
        fig12.count_params("l", 14, 225)
    with pytest.raises(ValueError, match="-1 registers"):
        fig12.build_vit("l", 14, 224, -1)
