"""Resizing of position embeddings: the closed-form operator against torch, and Figure 11's numbers."""

import fig10_fig11
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

HALF = torch.tensor([0.34, 0.77, -0.05, 0.99, -0.15, 0.91, 0.12, 0.57], dtype=torch.float64)
PROFILE = torch.cat([HALF, HALF.flip(0)])  # protocols, Figure 11, by size

sizes = st.integers(1, 24)
offsets = st.sampled_from([None, 0.1, 0.37])


def torch_operator(size_in, size_out, antialias, offset):
    """The same matrix the slow way: torch's resize of each unit vector, laid along the rows of a (size_in, 3) image.

    The second axis changes size too (3 -> 2), as torch copies where the whole grid keeps its size.
    """
    eye = torch.eye(size_in, dtype=torch.float64)[:, None, :, None].expand(-1, -1, -1, 3)
    kwargs = {"size": (size_out, 2)} if offset is None else {"scale_factor": ((size_out + offset) / size_in, 0.7)}
    return F.interpolate(eye, mode="bicubic", antialias=antialias, **kwargs)[:, 0, :, 0].T


def interpolate(x, grid_out, antialias, offset):
    sizes = list(zip(x.shape[-2:], grid_out, strict=True))
    if offset is None:
        return F.interpolate(x, size=tuple(grid_out), mode="bicubic", antialias=antialias)
    # an antialiased axis of equal size is copied forward whatever the scale, but torch 2.14's backward does not know it
    scale = tuple(1.0 if antialias and m == n else (n + offset) / m for m, n in sizes)
    return F.interpolate(x, scale_factor=scale, mode="bicubic", antialias=antialias)


def unit_gradient(grid_in=(16, 16), grid_out=(7, 7), antialias=False, offset=None):
    """The gradient at each input cell when every output of torch's resize has a gradient of one (Figure 11)."""
    x = torch.zeros(1, 1, *grid_in, dtype=torch.float64, requires_grad=True)
    y = interpolate(x, grid_out, antialias, offset)
    return torch.autograd.grad(y, x, torch.ones_like(y))[0][0, 0]


def test_figure11_profile_by_size():
    profile = fig10_fig11.resize_operator(16, 7).sum(0)
    assert (profile - PROFILE).abs().max() < 0.0051, profile  # the protocol prints two digits; -0.145 is its -0.15
    torch.testing.assert_close(profile, profile.flip(0))


def test_by_scale_factor_the_mirror_symmetry_is_lost():
    profile = fig10_fig11.resize_operator(16, 7, offset=fig10_fig11.DINOV2_OFFSET).sum(0)
    assert (profile - profile.flip(0)).abs().max() > 0.2
    assert fig10_fig11.relative_std(profile) > 0.2


@settings(max_examples=150, deadline=None)
@given(size_in=sizes, size_out=sizes, antialias=st.booleans(), offset=offsets)
def test_operator_equals_torch(size_in, size_out, antialias, offset):
    operator = fig10_fig11.resize_operator(size_in, size_out, antialias, offset)
    torch.testing.assert_close(operator, torch_operator(size_in, size_out, antialias, offset), rtol=0, atol=1e-12)
    torch.testing.assert_close(operator.sum(1), torch.ones(size_out, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(grid_in=st.tuples(sizes, sizes), grid_out=st.tuples(sizes, sizes), antialias=st.booleans(), offset=offsets)
def test_autograd_equals_the_outer_product_of_the_operators(grid_in, grid_out, antialias, offset):
    gradient = unit_gradient(grid_in, grid_out, antialias, offset)
    if grid_in == grid_out:
        offset = None  # torch copies
    sums = [fig10_fig11.resize_operator(i, o, antialias, offset).sum(0) for i, o in zip(grid_in, grid_out, strict=True)]
    torch.testing.assert_close(gradient, torch.outer(*sums), rtol=0, atol=1e-11)
    assert gradient.sum().item() == pytest.approx(grid_out[0] * grid_out[1])


def test_cubic_kernel_by_hand():
    distance = torch.tensor([0.0, 0.5, -0.5, 1.0, 1.5, 2.0, 3.0])
    by_hand = torch.tensor([1.0, 0.5 + 0.0625 + 0.03125, 0.59375, 0.0, -0.09375, 0.0, 0.0])  # a = -0.75
    torch.testing.assert_close(fig10_fig11.cubic_kernel(distance, -0.75), by_hand)


def test_same_size_is_the_identity():
    for antialias in (False, True):
        torch.testing.assert_close(fig10_fig11.resize_operator(9, 9, antialias), torch.eye(9, dtype=torch.float64))


@pytest.mark.parametrize("offset", [None, 0.1])
def test_antialiasing_removes_the_stripes(offset):
    strength = {}
    for antialias in (False, True):
        _, columns = fig10_fig11.axis_profiles(unit_gradient(antialias=antialias, offset=offset), border=2)
        strength[antialias] = fig10_fig11.relative_std(columns).item()
    assert strength[False] > 0.2  # claim C039
    assert strength[True] < 0.05 * strength[False], strength  # claim C040


def test_unit_gradients_stripe_rows_and_columns_alike():
    gradient = unit_gradient()
    rows, columns = fig10_fig11.axis_profiles(gradient)
    torch.testing.assert_close(rows, columns)
    assert fig10_fig11.stripe_ratio(gradient).item() == pytest.approx(1)


def test_stripe_measures_by_hand():
    striped = torch.tensor([0.0, 2.0]).repeat(4).expand(6, 8)  # vertical stripes, period 2
    rows, columns = fig10_fig11.axis_profiles(striped)
    torch.testing.assert_close(rows, torch.ones(6))
    assert fig10_fig11.relative_std(columns) == 1 and fig10_fig11.relative_std(rows) == 0
    assert fig10_fig11.stripe_ratio(striped).isinf() and fig10_fig11.stripe_ratio(striped.T) == 0
    assert fig10_fig11.stripe_ratio(torch.ones(4, 4)).isnan()


def test_border_is_dropped_on_every_side():
    ring = torch.ones(2, 5, 7)
    ring[:, 1:-1, 1:-1] = 0
    rows, columns = fig10_fig11.axis_profiles(ring, border=1)
    assert rows.shape == (2, 3) and columns.shape == (2, 5) and not rows.any() and not columns.any()
    with pytest.raises(ValueError, match="border 3 leaves nothing"):
        fig10_fig11.axis_profiles(ring, border=3)


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
@pytest.mark.parametrize("antialias", [False, True])
def test_resize_pos_embed_equals_the_operators_and_timm(num_prefix, antialias):
    from timm.layers import resample_abs_pos_embed

    generator = torch.Generator().manual_seed(0)
    pos_embed = torch.randn(1, num_prefix + 6 * 9, 8, generator=generator)
    before = pos_embed.clone()
    resized = fig10_fig11.resize_pos_embed(pos_embed, (6, 9), (4, 11), num_prefix, antialias)
    rows, cols = fig10_fig11.resize_operator(6, 4, antialias), fig10_fig11.resize_operator(9, 11, antialias)
    patches = pos_embed[:, num_prefix:].double().reshape(1, 6, 9, 8)
    by_matrix = torch.einsum("ij,kl,bjld->bikd", rows, cols, patches).reshape(1, 44, 8).float()
    torch.testing.assert_close(resized[:, num_prefix:], by_matrix, rtol=0, atol=1e-5)
    assert torch.equal(resized[:, :num_prefix], pos_embed[:, :num_prefix])
    by_timm = resample_abs_pos_embed(pos_embed, [4, 11], [6, 9], num_prefix, antialias=antialias)
    torch.testing.assert_close(resized, by_timm)
    assert torch.equal(pos_embed, before)


def test_resize_by_scale_factor_samples_elsewhere():
    pos_embed = torch.randn(1, 256, 4, generator=torch.Generator().manual_seed(0))
    resized = fig10_fig11.resize_pos_embed(pos_embed, (16, 16), (7, 7), antialias=False, offset=0.1)
    axis = fig10_fig11.resize_operator(16, 7, offset=0.1).float()
    by_matrix = torch.einsum("ij,kl,bjld->bikd", axis, axis, pos_embed.reshape(1, 16, 16, 4)).reshape(1, 49, 4)
    torch.testing.assert_close(resized, by_matrix, rtol=0, atol=1e-5)
    assert (resized - fig10_fig11.resize_pos_embed(pos_embed, (16, 16), (7, 7), antialias=False)).abs().max() > 0.1


def test_equal_grids_give_a_copy_and_dtype_is_kept():
    pos_embed = torch.randn(1, 10, 4, dtype=torch.bfloat16)
    same = fig10_fig11.resize_pos_embed(pos_embed, (3, 3), (3, 3), num_prefix=1, offset=0.1)
    assert torch.equal(same, pos_embed) and same.data_ptr() != pos_embed.data_ptr()
    assert fig10_fig11.resize_pos_embed(pos_embed, (3, 3), (5, 2), num_prefix=1).dtype == torch.bfloat16


def test_the_official_offset_gives_the_wanted_grid_at_every_size():
    for size_out in range(1, 150):
        pos_embed = torch.zeros(1, 37 * 2, 1)
        resized = fig10_fig11.resize_pos_embed(pos_embed, (37, 2), (size_out, 3), antialias=False, offset=0.1)
        assert resized.shape[1] == 3 * size_out
        assert unit_gradient((37, 2), (size_out, 3), offset=0.1).sum().item() == pytest.approx(3 * size_out)


def test_one_column_is_resized_like_any_other():
    pos_embed = torch.randn(1, 12, 2, generator=torch.Generator().manual_seed(0))
    resized = fig10_fig11.resize_pos_embed(
        pos_embed, (4, 3), (6, 1)
    )  # F.interpolate repeats the first row here (torch 2.14)
    by_matrix = fig10_fig11.resize_operator(4, 6, antialias=True).float() @ (
        torch.einsum(
            "c,rcd->rd", fig10_fig11.resize_operator(3, 1, antialias=True)[0].float(), pos_embed.reshape(4, 3, 2)
        )
    )
    torch.testing.assert_close(resized[0], by_matrix)


def test_wrong_counts_and_offsets_are_refused():
    with pytest.raises(ValueError, match=r"expected \(batch, 257, dim\) for 1 prefix"):
        fig10_fig11.resize_pos_embed(torch.zeros(1, 261, 4), (16, 16), (7, 7), num_prefix=1)
    with pytest.raises(ValueError, match="offset 1.5 out of range"):
        fig10_fig11.resize_operator(16, 7, offset=1.5)
    with pytest.raises(ValueError, match="at least 1"):
        fig10_fig11.resize_operator(16, 0)


def test_the_commonest_place_is_chosen_on_one_half_of_the_images_and_judged_on_the_other():
    is_outlier = torch.zeros(8, 3, 4, dtype=torch.bool)
    is_outlier[::2, 2, 1] = True  # on all even images and on one odd one
    is_outlier[3, 2, 1] = True
    place, hits = fig10_fig11.on_odd_and_even(is_outlier)
    assert place.tolist() == [2, 1] and hits.tolist() == [False, True, False, False]
