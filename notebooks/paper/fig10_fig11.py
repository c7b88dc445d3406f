"""How position embeddings are resized, and the stripes caused by missing antialiasing (Fig. 10, 11; App. A).

The training of DINOv2 resizes a 16x16 grid of position embeddings to 7x7 for its local crops. Without antialiasing a
bicubic resize reads only four cells per axis for each output. So some cells get hardly any gradient and their
neighbours a large one: the gradient map is striped. Bicubic resizing is separable: a small matrix per axis defines it.

Conventions: grids are (rows, cols), maps (..., rows, cols); pixel centres are half-integers (`align_corners=False`);
`offset` is the 0.1 that the official DINOv2 code adds to the wanted grid size before it computes a scale factor
(dinov2/models/vision_transformer.py, `interpolate_pos_encoding`), which shifts the samples. None resizes by size.
"Plain" means without antialiasing. The bicubic coefficient is a = -0.75 plain and a = -0.5 antialiased, as in PyTorch.
"""

import copy
import dataclasses
import math

import torch

DINOV2_OFFSET = 0.1  # official default, together with antialias=False


def resize_operator(
    size_in: int, size_out: int, antialias: bool = False, offset: float | None = None, a: float | None = None
) -> torch.Tensor:
    """The matrix (size_out, size_in), float64, that bicubic resizing applies along one axis.

    `out = operator @ in`; rows sum to 1. The sum of a column is the gradient of that input cell when every output has a
    gradient of 1. `offset` None: by size. Otherwise by the scale factor (size_out + offset) / size_in, 0 < offset < 1.
    `a` is the bicubic coefficient, by default PyTorch's (-0.75 plain, -0.5 antialiased). As in PyTorch, an offset is
    ignored at equal sizes with antialiasing. Without antialiasing, torch ignores it only if the whole grid has equal
    size. Written in closed form, independent of torch's interpolation (Keys 1981; Fig. 11).
    """
    _check_sizes(size_in, size_out, offset)
    if antialias and size_in == size_out:
        return torch.eye(size_in, dtype=torch.float64)
    if a is None:
        a = -0.5 if antialias else -0.75
    step = size_in / (size_out + (offset or 0.0))  # input cells per output cell
    centres = (torch.arange(size_out, dtype=torch.float64) + 0.5) * step
    if antialias:
        return _antialiased_operator(size_in, centres, max(step, 1.0), a)
    source = centres - 0.5
    first = source.floor()
    operator = torch.zeros(size_out, size_in, dtype=torch.float64)
    for tap in range(-1, 3):  # taps beyond the edge read the edge cell
        cell = (first + tap).clamp(0, size_in - 1).long()
        weight = cubic_kernel(source - first - tap, a)
        operator.scatter_add_(1, cell[:, None], weight[:, None])
    return operator


def cubic_kernel(distance: torch.Tensor, a: float) -> torch.Tensor:
    """Weight of the cubic convolution kernel at a signed distance in cells, any shape; 0 beyond 2 (Keys 1981)."""
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def resize_pos_embed(
    pos_embed: torch.Tensor,
    grid_in: tuple[int, int],
    grid_out: tuple[int, int],
    num_prefix: int = 0,
    antialias: bool = True,
    offset: float | None = None,
) -> torch.Tensor:
    """A new position embedding (batch, num_prefix + rows*cols, dim) for `grid_out`, bicubic, of the input's dtype.

    `pos_embed`: (batch, num_prefix + rows*cols of grid_in, dim), row by row. `num_prefix`: how many leading entries
    belong to cls (and registers); they are copied. It is 0 for timm models built with `no_embed_class`. timm
    antialiases by default; the official DINOv2 code uses antialias=False, offset=0.1. Equal grids give an unchanged
    copy, as in both codes. Raises ValueError if the number of entries does not fit.
    """
    expected = num_prefix + grid_in[0] * grid_in[1]
    if pos_embed.ndim != 3 or pos_embed.shape[1] != expected:
        raise ValueError(
            f"pos_embed of shape {tuple(pos_embed.shape)}: expected (batch, {expected}, dim) for {num_prefix} prefix "
            f"entries and a grid of {tuple(grid_in)}; registers and, with no_embed_class, cls have no entry"
        )
    if tuple(grid_in) == tuple(grid_out):
        return pos_embed.clone()
    prefix, patches = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    dtype = torch.promote_types(pos_embed.dtype, torch.float32)  # never below float32
    # by the operators, not F.interpolate: torch 2.14's antialiased resize is wrong on CPU for an output of one column
    along_rows, along_cols = (
        resize_operator(i, o, antialias, offset).to(patches.device, dtype)
        for i, o in zip(grid_in, grid_out, strict=True)
    )
    patches = patches.to(dtype).unflatten(1, tuple(grid_in))  # (batch, rows, cols, dim)
    patches = torch.einsum("ir,jc,brcd->bijd", along_rows, along_cols, patches).flatten(1, 2)
    return torch.cat([prefix, patches.to(pos_embed.dtype)], dim=1)


def at_size(model, size: int, antialias: bool = True, offset: float | None = None):
    """A copy of a `zoo.Model` for images of `size` pixels a side; `resize_pos_embed` resizes its position embeddings.

    Raises ValueError for a model without a learned embedding for each place, or a `size` that patches do not divide.
    """
    module, patch = copy.deepcopy(model.module), model.anatomy.patch_size
    if getattr(module, "pos_embed", None) is None or size % patch[0] or size % patch[1]:
        raise ValueError(
            f"{model.label}: {size} pixels do not divide into its patches, or it has no position embedding"
        )
    before, grid_in = module.pos_embed.detach(), tuple(module.patch_embed.grid_size)
    grid_out = (size // patch[0], size // patch[1])
    prefix = before.shape[1] - grid_in[0] * grid_in[1]
    module.set_input_size((size, size))
    module.pos_embed = torch.nn.Parameter(
        resize_pos_embed(before, grid_in, grid_out, prefix, antialias, offset), requires_grad=False
    )
    return dataclasses.replace(model, module=module, input_size=size)


def place_scores(share: torch.Tensor) -> dict[str, float]:
    """Scores of a map (rows, cols): for each place, the share of images with an outlier there (Fig. 10, C035 to C038).

    largest_share; border_share, the mean of the two outermost rings; centre_share, the mean of the central half of rows
    and columns; stripe_ratio, column over row variance without the two outermost rings (NaN if nothing varies).
    """
    rows, cols = share.shape
    inner = share[2 : rows - 2, 2 : cols - 2]
    border = (share.sum() - inner.sum()) / (share.numel() - inner.numel())
    centre = share[rows // 4 : rows - rows // 4, cols // 4 : cols - cols // 4]
    return {
        "largest_share": share.max().item(),
        "border_share": border.item(),
        "centre_share": centre.mean().item(),
        "stripe_ratio": stripe_ratio(share, 2).item(),
    }


def axis_profiles(maps: torch.Tensor, border: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of each row (..., rows) and mean of each column (..., cols) of maps (..., rows, cols).

    First, `border` cells are dropped on every side, because the outermost cells also stand for cells beyond the edge.
    Vertical stripes show in the column profile. Raises ValueError if nothing is left.
    """
    rows, cols = maps.shape[-2:]
    if border < 0 or 2 * border >= min(rows, cols):
        raise ValueError(f"border {border} leaves nothing of a {rows}x{cols} map (0…{(min(rows, cols) - 1) // 2})")
    inner = maps[..., border : rows - border, border : cols - border]
    return inner.mean(-1), inner.mean(-2)


def relative_std(profile: torch.Tensor) -> torch.Tensor:
    """Standard deviation (population) over mean of profiles (..., cells) -> (...): 0 is flat (claims C039 to C041).

    Profiles of sums and profiles of means give the same value. Infinite or NaN if the mean is 0.
    """
    return profile.std(-1, correction=0) / profile.mean(-1)


def stripe_ratio(maps: torch.Tensor, border: int = 0) -> torch.Tensor:
    """Variance of column means over variance of row means, (..., rows, cols) -> (...); Fig. 10, claim C037.

    Above 1: more vertical than horizontal stripes; 1 for an exact unit gradient on a square grid. Infinite if only the
    columns vary, NaN if neither varies. Drop the border if outliers are more frequent at the edges.
    """
    row_means, col_means = axis_profiles(maps, border)
    return col_means.var(-1, correction=0) / row_means.var(-1, correction=0)


def _antialiased_operator(size_in: int, centres: torch.Tensor, width: float, a: float) -> torch.Tensor:
    # the kernel is widened by `width`; cells whose index lies inside the rounded support count, the rest are cut
    cells = torch.arange(size_in, dtype=torch.float64)
    support = 2 * width
    low = (centres - support + 0.5).trunc().clamp(min=0)[:, None]
    high = (centres + support + 0.5).trunc().clamp(max=size_in)[:, None]
    weight = cubic_kernel((cells + 0.5 - centres[:, None]) / width, a)
    weight = torch.where((cells >= low) & (cells < high), weight, torch.zeros_like(weight))
    return weight / weight.sum(1, keepdim=True)


def _check_sizes(size_in: int, size_out: int, offset: float | None) -> None:
    if size_in < 1 or size_out < 1:
        raise ValueError(f"sizes must be at least 1, got {size_in} -> {size_out}")
    if offset is not None and not 0 < offset < 1:
        raise ValueError(
            f"offset {offset} out of range: above 0 and below 1, or None for by size (official: {DINOV2_OFFSET})"
        )


def on_odd_and_even(is_outlier: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The place (row, col) with most outliers in the even images, and (odd images,) bool: is it an outlier there?

    is_outlier: (images, rows, cols) bool. Two halves are needed because the largest of many shares is large by chance.
    """
    share = is_outlier[::2].float().mean(0)
    place = torch.tensor(divmod(int(share.argmax()), share.shape[1]))
    return place, is_outlier[1::2, place[0], place[1]]


def claims10(model, is_outlier: torch.Tensor | None, table, resized: dict):
    """Yields the arguments of `Run.claim`: C035 to C038 on `model`, a trained model with artifacts, or None.

    is_outlier: (images, rows, cols) of that model; table: `place_scores`, one row a model; resized: maps of the share
    of images by title.
    """
    from scipy.stats import binomtest
    from verdicts import above

    from vitreg_lib.measure.pairs import interval

    if model is None:
        shares = "; ".join(f"{name}: largest share {row.largest_share:.0%}" for name, row in table.iterrows())
        for claim in ("C035", "C036"):
            yield claim, None, f"no trained model here has artifacts ({shares})"
    else:
        place, hits = on_odd_and_even(is_outlier)
        low, high = binomtest(int(hits.sum()), len(hits)).proportion_ci(
            0.95
        )  # exact: a bootstrap of zeros has no width
        text = f"{model.label}, row {place[0]}, column {place[1]}: {hits.float().mean():.0%} ({low:.0%} to {high:.0%})"
        yield "C035", above(low, high, 0.1), f"{text} of the other half of the images"
        by_image = [place_scores(mask.float()) for mask in is_outlier]
        gap = torch.tensor([scores["border_share"] - scores["centre_share"] for scores in by_image])
        low, high = interval(gap)
        row = table.loc[model.label]
        text = f"{model.label}: border {row.border_share:.2%}, centre {row.centre_share:.2%}"
        yield "C036", above(low, high), f"{text}, difference {100 * low:+.1f} to {100 * high:+.1f} points"
    text = "; ".join(f"{name}: {_stripes(share)}" for name, share in resized.items())
    for claim in ("C037", "C038"):
        yield claim, None, f"needs DINOv2 models trained without and with antialiasing. Resized at test time: {text}"


def _stripes(share: torch.Tensor) -> str:
    ratio = stripe_ratio(share, 2).item()
    if math.isfinite(ratio):
        return f"column variance / row variance {ratio:.2f}"
    return "outliers in the two outermost rings only" if share.any() else "no outlier"


def claims11(table):
    """Yields the arguments of `Run.claim`: C039 to C041.

    table: column_relative_std and row_relative_std of resizing by size, by scale factor, antialiased.
    """
    plain, official, smooth = (table.iloc[i] for i in range(3))
    text = f"relative std {plain.column_relative_std:.2f} by size, {official.column_relative_std:.2f} by scale factor"
    yield "C039", bool(plain.column_relative_std > 0.2), text
    text = f"{smooth.column_relative_std:.3f} antialiased, {plain.column_relative_std:.2f} plain"
    yield "C040", bool(smooth.column_relative_std < plain.column_relative_std), text
    one_axis = abs(plain.row_relative_std - plain.column_relative_std) > 0.1
    text = f"rows {plain.row_relative_std:.2f}, columns {plain.column_relative_std:.2f}: both axes have stripes"
    yield "C041", bool(one_axis), text
