"""Checks of the workshop's exercises (notebooks/workshop): they say what is wrong, but never give the answer.

Each `check_…` takes the student's answer and the data of the notebook, and computes the truth with the library. It
returns a `Checked`: nothing filled in yet, not yet right (with a line that says what to look at), or right (with a
conclusion).
"""

from __future__ import annotations

import functools
import html
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vitreg_lib.measure import outliers

MARKS = {"empty": ("…", "#767676"), "not yet": ("✗", "#D55E00"), "right": ("✓", "#0072B2")}


@dataclass(frozen=True)
class Checked:
    """The result of a check. state: "empty", "not yet" or "right"; line: one or two sentences."""

    exercise: str
    state: str
    line: str

    def __repr__(self) -> str:
        return f"{MARKS[self.state][0]} {self.exercise}: {self.line}"

    def _repr_html_(self) -> str:
        style = f"border-left: 4px solid {MARKS[self.state][1]}; padding: 0.3em 0.8em"
        return f'<div style="{style}">{html.escape(repr(self))}</div>'


class NotYet(Exception):
    """The answer is not right; the message is the line that the student reads."""


class Empty(Exception):
    """Nothing is filled in; the message is the line that the student reads."""


def check(exercise: str):
    """A decorator for a function that returns the line for a right answer and raises NotYet or Empty otherwise.

    The decorated function returns a `Checked`.
    """

    def outer(function):
        @functools.wraps(function)
        def inner(answer, *data) -> Checked:
            try:
                if answer is ...:
                    raise Empty("nothing filled in yet. Replace the ... above and run both cells.")
                return Checked(exercise, "right", function(answer, *data))
            except Empty as error:
                return Checked(exercise, "empty", str(error))
            except NotYet as error:
                return Checked(exercise, "not yet", str(error))

        inner.exercise = exercise
        return inner

    return outer


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(function, *arguments):
    """The result of the student's function on these arguments; an error inside it becomes NotYet."""
    if not callable(function):
        raise NotYet(f"the answer must be a function (def …), yours is {short(function)}")
    try:
        result = function(*arguments)
    except Exception as error:  # whatever a student's code may raise
        shapes = ", ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else str(a) for a in arguments)
        raise NotYet(f"your function raised {type(error).__name__}: {short(error)} (its input: {shapes})") from None
    if result is None or result is ...:
        raise Empty("the function returns nothing yet. Fill it in (it ends with return …) and run both cells.")
    return result


def tensor(found) -> Tensor:
    """The answer as a tensor, or NotYet."""
    try:
        return torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        raise NotYet(f"the answer must be a tensor, yours is {short(found)}") from None


def shaped(found: Tensor, shape, words: str) -> None:
    """NotYet for another shape than `shape`, which `words` explain."""
    if found.shape != shape:
        raise NotYet(f"the shape is {tuple(found.shape)}; it should be {words}, here {tuple(shape)}")


def number(found) -> float:
    """The answer as one number, or NotYet."""
    try:
        value = float(found)
    except (TypeError, ValueError, RuntimeError):
        raise NotYet(f"the answer must be one number, yours is {short(found)}") from None
    if math.isnan(value):
        raise NotYet("your number is NaN: was something divided by zero, or is it the mean of an empty set?")
    return value


def whole(found, what: str) -> int:
    """The answer as a whole number, or NotYet; `what` names the number."""
    value = number(found)
    if not value.is_integer():
        raise NotYet(f"the answer must be {what}, a whole number, yours is {value:g}")
    return int(value)


def compare(found: Tensor, truth: Tensor, mistakes: dict[str, Tensor], what: str) -> None:
    """Raise NotYet unless `found` is close to the truth: with the line of the mistake that it equals, or the gap."""
    found, near = found.to(truth.dtype), dict(rtol=1e-3, atol=1e-5)
    if torch.allclose(found, truth, **near):
        return
    for line, wrong in mistakes.items():
        if wrong.shape == found.shape and torch.allclose(found, wrong, **near):
            raise NotYet(line)
    gap = (found - truth).abs().max().item()
    raise NotYet(f"the shape is right, the {what} are not: the largest difference is {gap:.3g}")


def compare_numbers(found: float, truth: float, mistakes: dict[str, float], what: str) -> None:
    """`compare` for one number, with a relative tolerance of 1 %."""
    if math.isclose(found, truth, rel_tol=1e-2, abs_tol=1e-6):
        return
    for line, wrong in mistakes.items():
        if math.isclose(found, wrong, rel_tol=1e-2, abs_tol=1e-6):
            raise NotYet(line)
    raise NotYet(f"{found:.3g} is too {'high' if found > truth else 'low'} for the {what}")


def short(value) -> str:
    """A value as a text of one line, at most 100 characters."""
    text = " ".join(str(value).split()) or "empty"
    return text if len(text) <= 100 else text[:97] + "…"


# 1 Tokens and norms


@check("1.1 norms of patch tokens")
def check_patch_norms(function, tokens: Tensor, num_prefix_tokens: int) -> str:
    """The student's patch_norms(tokens, num_prefix_tokens) on the notebook's tokens (images, tokens, dim)."""
    for x, prefix in ((tokens, num_prefix_tokens), (numbers(3, 11, 4), 5)):  # the second also has registers
        truth = x[:, prefix:].norm(dim=-1)
        found = tensor(call(function, x, prefix))
        patches = truth.shape[1]
        if found.shape == (len(x), x.shape[1]):
            raise NotYet(f"{x.shape[1]} values per image, but there are {patches} patches: which tokens are too many?")
        if found.shape == (len(x), x.shape[2]):
            raise NotYet("one value for each dimension: you took the norm along the tokens, not of each token")
        shaped(found, truth.shape, "(images, patches)")
        own = x[:, prefix:]
        compare(
            found,
            truth,
            {
                "these are squared lengths: one step is missing": own.square().sum(-1),
                "this is the sum of absolute values (L1): the paper's norm is L2": own.abs().sum(-1),
                "this is a mean over the dimensions: an L2 norm is a sum": own.square().mean(-1).sqrt(),
                "the right number of values, but of the wrong tokens: where in the sequence are cls and registers?": x[
                    :, : x.shape[1] - prefix
                ].norm(dim=-1),
            },
            "norms",
        )
    return "right, with registers in the sequence too. Prefix tokens are never part of a statement about patches."


@check("1.2 the onset")
def check_onset(answer, norms: Tensor) -> str:
    """The first block with outliers, for norms (images, layers, patches) of a model that has outliers."""
    depth, cut = norms.shape[1], outliers.cutoff(norms[:, -1])
    truth = outliers.onset_of(norms, norms[:, -1] > cut, cut, depth - 1)
    block = whole(answer, "a block's number")
    if not 0 <= block < depth:
        raise NotYet(f"there is no block {block}: they are counted from 0 to {depth - 1}")
    at = norms[:, block]
    ratio = (at.max() / at.median()).item()
    if block == truth:
        return (
            f"right: the largest norm is {ratio:.0f} times the median from here on, and the gap stays in later blocks."
        )
    if block == truth + 1:
        raise NotYet("close: the outliers are there before this block. Is your first block 0 or 1?")
    if block > truth:
        raise NotYet("the outliers are there, but not for the first time: look at earlier blocks")
    share = outliers.separated_share(norms)[block].item()
    raise NotYet(
        f"after this block {share:.1%} of tokens lie above 3 medians, but they are the tail of one group, or disappear "
        "in the next block: look for the first block with two groups that stay"
    )


@check("1.3 a rule for the cutoff")
def check_cutoff(function, norms: Tensor, truth: Tensor, clean: Tensor) -> str:
    """The student's cutoff(norms), scored against known outliers and on a model that has none; norms (images, patches).

    Precision and recall of at least 0.9, at most 0.1 % flagged on `clean`, and both again with all norms 20 times as
    large.
    """
    for factor in (1.0, 20.0):
        other = (
            ""
            if factor == 1
            else " in a model whose norms are all 20 times as large (does your rule contain a fixed number?)"
        )
        cut = number(call(function, norms * factor))
        found = outliers.score(norms * factor > cut, truth)
        if found["recall"] < 0.9:
            raise NotYet(
                f"the rule misses {1 - found['recall']:.0%} of the planted outliers{other}: the cutoff is too high"
            )
        if found["precision"] < 0.9:
            raise NotYet(
                f"only {found['precision']:.0%} of the outliers by this rule were planted{other}: the cutoff is too low"
            )
        flagged = (clean * factor > number(call(function, clean * factor))).float().mean().item()
        if flagged > 1e-3:
            raise NotYet(
                f"good on the planted control, but on the random one, which has no outliers, it calls {flagged:.1%} "
                f"of the tokens outliers{other}. Would this rule find outliers in every model?"
            )
    return "right: it finds the planted outliers and nothing in the random model, also at another scale."


def compare_with_detector(function, found: dict[str, outliers.Outliers]) -> str:
    """The outliers of real models by the student's cutoff(norms) and by the library's detector, one line a model."""
    try:
        lines = []
        for name, each in found.items():
            mine = each.norms > number(call(function, each.norms.flatten(1)))
            both = (mine & each.mask).sum().item()
            lines.append(
                f"{name}: your rule {mine.float().mean():.1%} of the tokens, the detector {each.share:.1%}; "
                f"{both} tokens of {int((mine | each.mask).sum())} in both"
            )
        return "\n".join(lines)
    except (Empty, NotYet) as error:
        return f"fill in exercise 1.3 first ({error})"


# 2 Attention


@check("2.1 a row of attention")
def check_attention_row(function, q: Tensor, k: Tensor) -> str:
    """The student's attention_row(q, k), q (heads, head_dim) of one query and k (heads, tokens, head_dim)."""
    from vitreg_lib.hooks.capture import attention_rows

    # keys as large as in a trained model, so that a missing factor has an effect
    for queries, keys in ((q, k), (2 * numbers(3, 8), 2 * numbers(3, 7, 8))):
        truth = attention_rows(queries[None, :, None], keys[None])[0, :, 0]
        found = tensor(call(function, queries, keys))
        shaped(found, truth.shape, "(heads, tokens)")
        scores = (keys @ queries[:, :, None])[:, :, 0]
        dim = queries.shape[-1]
        compare(
            found,
            truth,
            {
                "these are scores, not shares: a row of attention sums to 1": scores,
                "these are scaled scores, not shares: a row of attention sums to 1": scores / dim**0.5,
                "the rows sum to 1 and are too peaked: a factor is missing before the softmax": scores.softmax(-1),
                "the rows sum to 1 and are too flat: by what is the score divided?": (scores / dim).softmax(-1),
                "each token's values sum to 1 over the heads: along which axis should they?": (
                    scores / dim**0.5
                ).softmax(0),
            },
            "shares",
        )
    return (
        "right: the same numbers as inside the model. For one query this is all: no tokens × tokens matrix is needed."
    )


@check("2.2 the share on outliers")
def check_share(answer, rows: Tensor, is_outlier: Tensor) -> str:
    """Share of attention rows (images, heads, tokens) on outliers (images, patches), averaged over all rows."""
    prefix = rows.shape[-1] - is_outlier.shape[-1]
    on = (rows[..., prefix:] * is_outlier[:, None]).sum(-1)
    truth = on.mean().item()
    count = is_outlier.float().mean().item()
    compare_numbers(
        number(answer),
        truth,
        {
            "this is a percentage: a share lies between 0 and 1": 100 * truth,
            "this is how many of the patches are outliers, not how much attention they get": count,
            "this is what one outlier gets on average: take all outliers of an image together": (
                rows[..., prefix:][is_outlier[:, None].expand_as(rows[..., prefix:])].mean().item()
            ),
            "the heads are added up: take their mean": on.sum(1).mean().item(),
            "this is a share of the attention on patches: take the whole row, with cls and registers": (
                (on / rows[..., prefix:].sum(-1)).mean().item()
            ),
        },
        "share",
    )
    return (
        f"right: {truth:.0%} of the attention, for {count:.1%} of the patches, {truth / count:.0f} times an even share."
    )


@check("2.3 the head that attends")
def check_head(answer, rows: Tensor, is_outlier: Tensor) -> str:
    """The head that gives outliers the most, for rows (images, heads, tokens) and outliers (images, patches)."""
    prefix = rows.shape[-1] - is_outlier.shape[-1]
    by_head = (rows[..., prefix:] * is_outlier[:, None]).sum(-1).mean(0)
    head, truth = whole(answer, "a head's number"), int(by_head.argmax())
    if head == truth:
        others = (by_head.sum() - by_head[truth]) / max(1, len(by_head) - 1)
        return f"right: it gives outliers {by_head[truth]:.0%} of its attention, the others {others:.0%} on average."
    if head == -1:
        raise NotYet("-1 is the mean of all heads in the explorer: go through them one by one")
    if not 0 <= head < len(by_head):
        raise NotYet(f"there is no head {head}: they are counted from 0 to {len(by_head) - 1}")
    raise NotYet(f"head {head} gives the outliers {by_head[head]:.0%} of its attention; another head gives them more")


# 3 What outlier tokens know


@check("3.1 a split without leaks")
def check_split(function) -> str:
    """The student's split(image_ids): True for test tokens; no image on both sides, a tenth to a half for the test."""
    for first, images, patches in ((0, 41, 9), (100, 30, 4)):
        ids = first + torch.arange(images).repeat_interleave(patches)
        for image_ids in (ids, ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]):
            is_test = tensor(call(function, image_ids))
            if is_test.dtype != torch.bool:
                raise NotYet(f"the answer must be a bool for each token, True for test; yours is {is_test.dtype}")
            shaped(is_test, image_ids.shape, "(tokens,)")
            share = is_test.float().mean().item()
            if share in (0.0, 1.0):
                name = "test" if share == 0 else "training"
                raise NotYet(f"no token is left for {name} (image ids went from {first} to {first + images - 1})")
            leaking = set(image_ids[is_test].tolist()) & set(image_ids[~is_test].tolist())
            if leaking:
                raise NotYet(
                    f"{len(leaking)} of {images} images have tokens on both sides: what can the probe learn "
                    "from an image in training and use in the test?"
                )
            if not 0.1 <= share <= 0.5:
                raise NotYet(f"{share:.0%} of the tokens are for the test: a tenth to a half is usual")
    return "right: no image on both sides. Tokens of one image are not independent samples."


@check("3.2 a matched partner")
def check_partner(function) -> str:
    """The student's partner(is_outlier, row, col): the nearest normal cell (row, col) of one image's mask."""
    masks = []
    for cells in ([(2, 3)], [(0, 0)], [(0, 0), (0, 1), (1, 0)], [(3, 5), (3, 4), (2, 5), (1, 5)]):
        mask = torch.zeros(4, 6, dtype=torch.bool)
        mask[tuple(zip(*cells, strict=True))] = True
        masks.append((mask, cells))
    for mask, cells in masks:
        normal = (~mask).nonzero()
        for row, col in cells:
            place = call(function, mask.clone(), row, col)
            try:
                r, c = (int(value) for value in place)
            except (TypeError, ValueError):
                raise NotYet(f"the answer must be a pair (row, col), yours is {short(place)}") from None
            at = f"for the outlier at ({row}, {col}) you return ({r}, {c})"
            if not (0 <= r < mask.shape[0] and 0 <= c < mask.shape[1]):
                raise NotYet(f"{at}, which is outside the grid of {mask.shape[0]} × {mask.shape[1]}: mind the border")
            if (r, c) == (row, col):
                raise NotYet(f"{at}: that is the outlier itself")
            if mask[r, c]:
                raise NotYet(f"{at}: that is an outlier, too, not a normal token")
            least = (normal - torch.tensor([row, col])).square().sum(1).min().item()
            if (r - row) ** 2 + (c - col) ** 2 > least:
                raise NotYet(f"{at}: a normal token, but there is a nearer one (distance between cells of the grid)")
    return (
        "right, at the border and in clusters, too. Both groups now come from the same places, as nearly as possible."
    )


@check("3.3 the fair fit")
def check_fit(answer) -> str:
    """The fit that shows which information a group holds: the one trained on the group itself."""
    word = str(answer).strip().lower()
    if word == "normal":
        raise NotYet(
            "this probe never saw such a norm. Would it fail on tokens that contain everything, multiplied by ten?"
        )
    if word == "all":
        raise NotYet(
            "nearly all tokens of its training are normal, so it fits those. It is the paper's fit. What could lower "
            "its score on outliers, other than lost information?"
        )
    if word in ("outlier", "matched", "border"):
        raise NotYet(f"{word} is a group of tokens, a row of the table; the answer must be a fit, the name of a column")
    if word != "own":
        raise NotYet(f"{short(answer)} is no fit: the answer must be the name of a column of the table, as a text")
    return "right: only a probe trained on such tokens can show that something is not in them."


# 4 Registers


@check("4.1 add registers")
def check_add_registers(function) -> str:
    """The student's add_registers(x, registers): (batch, tokens, dim) with cls first, and (1, registers, dim)."""
    for batch, count in ((3, 4), (1, 2)):
        x, registers = numbers(batch, 10, 6), numbers(1, count, 6) + 5
        many = registers.expand(batch, -1, -1)
        found = tensor(call(function, x, registers))
        if found.shape == x.shape:
            raise NotYet(f"the sequence is as long as before: it should have {count} tokens more")
        truth = torch.cat([x[:, :1], many, x[:, 1:]], 1)
        shaped(found, truth.shape, "(batch, tokens + registers, dim)")
        compare(
            found,
            truth,
            {
                "registers are before cls: code that reads the class from x[:, 0] now reads a register": torch.cat(
                    [many, x], 1
                ),
                "registers are at the end: the usual order is cls, registers, patches": torch.cat([x, many], 1),
            },
            "tokens",
        )
    return "right: cls, registers, patches, as in timm. Registers get no position embedding: they have no place."


@check("4.2 the mean of patches")
def check_patch_mean(function) -> str:
    """The student's patch_mean(x, num_registers): (batch, dim) from the output (batch, tokens, dim)."""
    for batch, count in ((3, 4), (2, 0)):
        x = numbers(batch, 9 + 1 + count, 6)
        x[:, 1 : 1 + count] += 5
        truth = x[:, 1 + count :].mean(1)
        found = tensor(call(function, x, count))
        shaped(found, truth.shape, "(batch, dim)")
        compare(
            found,
            truth,
            {
                "all tokens are in this mean, cls and registers too": x.mean(1),
                "registers are still in this mean: a mistake that well-known libraries made, too": x[:, 1:].mean(1),
                "cls is still in this mean": torch.cat([x[:, :1], x[:, 1 + count :]], 1).mean(1),
                "cls is still in this mean, and a register or a patch is missing": x[:, count:].mean(1),
                "tokens are dropped at the end of the sequence: registers are elsewhere": x[
                    :, 1 : x.shape[1] - count
                ].mean(1),
                "the mean is along the dimensions, not over tokens": x[:, 1 + count :].mean(2)[:, :6],
            },
            "means",
        )
    return "right, also without registers. Tokens that collect global information do not belong in a mean of patches."


@check("4.3 what is left")
def check_left(answer, before: Tensor, after: Tensor, limit: float) -> str:
    """Share of the outliers that is left: norms (images, patches) before and after, and the cutoff for both."""
    shares = [(norms > limit).double().mean().item() for norms in (before, after)]
    truth = shares[1] / shares[0]
    compare_numbers(
        number(answer),
        truth,
        {
            "this is per cent: give a number from 0 to 1": 100 * truth,
            "the ratio is inverted: divide what is left by what was there": 1 / truth,
            "this is what is gone: 1 minus it is left": 1 - truth,
            "this is the share of patches that are outliers afterwards: divide it by the share before": shares[1],
            "this is a difference of two shares: divide instead": shares[0] - shares[1],
            "nothing is left only if the cutoff is too high: use `limit`, the same for both": 0.0,
        },
        "share",
    )
    return (
        f"right: {truth:.0%} of the outliers are left, at the same cutoff. Is it the registers' doing? Only the same "
        "training without registers can say it: the control."
    )


# 5 Objects


@check("5.1 overlap of boxes")
def check_iou(function) -> str:
    """The student's iou(a, b) of boxes (left, top, right, bottom): intersection over union."""
    from vitreg_lib.measure.objects import box_iou

    pairs = {
        "one box with itself": ([0, 0, 4, 2], [0, 0, 4, 2]),
        "two boxes that overlap": ([0, 0, 4, 4], [2, 1, 7, 5]),
        "a box inside another": ([0, 0, 6, 6], [1, 1, 3, 4]),
        "two separate boxes, to the right and below": ([0, 0, 2, 2], [5, 6, 8, 9]),
        "two separate boxes, one above the other": ([0, 0, 4, 2], [0, 5, 4, 8]),
    }
    for name, (a, b) in pairs.items():
        a, b = torch.tensor(a).float(), torch.tensor(b).float()
        truth = box_iou(a, b).item()
        found = number(call(function, a, b))
        width, height = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).tolist()
        overlap = max(width, 0) * max(height, 0)
        areas = [((box[2] - box[0]) * (box[3] - box[1])).item() for box in (a, b)]
        apart = f"for {name} there is no overlap, but your IoU is {found:.3g}: can a width be negative?"
        compare_numbers(
            found,
            truth,
            ({apart: found} if truth == 0 and found != 0 else {})
            | {
                f"for {name}: the union counts the overlap twice": overlap / sum(areas),
                f"for {name}: this divides by the smaller box: divide by the union": overlap / min(areas),
                f"for {name}: this divides by the larger box: divide by the union": overlap / max(areas),
                f"for {name}: this is the area of the overlap, not yet a share": overlap,
            },
            f"IoU for {name}",
        )
    return "right, for separate and nested boxes, too. From 0.5 on a box counts as a hit in CorLoc."


@check("5.2 the seed of LOST")
def check_seed(function, features: Tensor) -> str:
    """The student's seed(features): the patch of lowest degree, for the notebook's features (images, patches, dim)."""
    for f in [*(numbers(49, 6, seed=s) + 0.4 for s in range(3)), *features[:4]]:
        gram = f @ f.T
        degrees = (gram >= 0).sum(1)
        index = whole(call(function, f), "a patch's index")
        if not 0 <= index < len(f):
            raise NotYet(f"{index} is no patch: there are {len(f)}, counted from 0")
        if degrees[index] == degrees.min():  # any of equal ones
            continue
        lines = {
            "this is the patch with the most links: LOST starts from the one with the fewest": degrees.argmax(),
            "this is the patch of lowest summed similarity: only signs count, not sizes": gram.sum(1).argmin(),
            "this is the shortest feature: only signs of similarities count, not norms": f.norm(dim=1).argmin(),
        }
        for line, wrong in lines.items():
            if index == int(wrong):
                raise NotYet(line)
        least = int(degrees.min())
        raise NotYet(f"patch {index} has degree {int(degrees[index])}, and there is one of degree {least}")
    return "right: Equation 1 of LOST. An object has few patches, so they have few links; background patches have many."


@check("5.3 what registers change")
def check_gain(answer, without: Tensor, with_registers: Tensor) -> str:
    """Difference of CorLoc in points, from hits (images,) of the same images without and with registers."""
    from vitreg_lib.measure.objects import gain

    truth, low, high = gain(without, with_registers)
    before, after = without.double().mean().item(), with_registers.double().mean().item()
    compare_numbers(
        number(answer),
        truth,
        {
            "the sign is wrong: take with registers minus without": -truth,
            "this is a difference of shares: give it in points, which are hundredths": truth / 100,
            "this is the change relative to the value without; points are a plain difference": (
                100 * (after - before) / before if before else math.nan
            ),
            "this is the CorLoc with registers, not yet a difference": 100 * after,
        },
        "gain in points",
    )
    told = "zero is not inside" if low > 0 or high < 0 else "zero is inside, so these images do not decide it"
    return f"right: {truth:+.1f} points. Drawing the images anew gives {low:+.1f} to {high:+.1f} (95 %): {told}."


def class_from_one_token(kept, photos: str = "caltech101-small") -> dict[str, float]:
    """{kind of token: accuracy of a linear probe for the class of a photo, from one token of this kind}.

    kept: `Replayed.kept` of a model with stored tokens of labelled photos. Each kind has its own probe. Photos without
    an outlier are left out. The regularisation strength is chosen on a fifth of the training photos.
    """
    from vitreg_lib.probes import linear

    def part(name: str, token: str) -> Tensor:
        values, has = kept(f"set.{photos}.{name}.{token}"), kept(f"set.{photos}.{name}.has_outlier").bool()
        return values[has] if values.ndim < 3 else values[has, 0]  # the first of several drawn tokens

    y, y_test = part("train", "labels"), part("test", "labels")
    held, shares = linear.held_out(y, 0), {}
    for token in ("cls", "outlier", "matched", "normal"):
        x = part("train", token)
        x, x_held, x_test = linear.scale(x[~held], x[held], part("test", token))
        fit = linear.fit_selected(x, y[~held], x_held, y[held], (1e-2, 1e-1, 1.0), tol=1e-4)
        shares[token] = linear.accuracy(fit, x_test, y_test).item()
    return shares


def read_off_one_token(tokens: Tensor, labels: Tensor, groups: dict[str, Tensor], most: int = 2000) -> dict[str, float]:
    """{group: accuracy of a linear probe for the label of the image, from one token of this group}.

    tokens (images, patches, dim), labels (images,), groups of bool (images, patches). Each group has its own probe. The
    split is by image; at most `most` training tokens are drawn at random; the regularisation strength is chosen on
    validation images. NaN if a group is too small.
    """
    from vitreg_lib.probes import linear

    part = linear.split_by_image(torch.arange(len(tokens)))
    shares = {}
    for name, mask in groups.items():
        sides = [mask & (part == i)[:, None] for i in range(3)]
        x, y = ([values[side] for side in sides] for values in (tokens, labels[:, None].expand(mask.shape)))
        drawn = torch.randperm(len(x[0]), generator=torch.Generator().manual_seed(0))[:most]
        if not all(map(len, x)) or len(y[0][drawn].unique()) <= int(labels.max()):
            shares[name] = math.nan
            continue
        x = linear.scale(x[0][drawn], *x[1:])
        fit = linear.fit_logistic(x[0], y[0][drawn], (1e-2, 1e-1, 1.0), tol=1e-5)
        best = linear.select(fit, x[1], y[1])
        shares[name] = (linear.predict(fit, x[2], best).argmax(-1) == y[2]).double().mean().item()
    return shares
