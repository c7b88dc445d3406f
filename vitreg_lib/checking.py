"""What checks of exercises share: the verdict, and how a student's answer is run and compared with the truth.

A check is a function that returns the line for a right answer and raises `NotYet` or `Empty`; `check` makes a
`Checked` of it. It never fails on a student's mistake: an error inside their function becomes a line too. Usual
mistakes are computed beside the truth and recognised (`compare`), so that no line hangs on one model's numbers.
"""

from __future__ import annotations

import functools
import html
import math
from dataclasses import dataclass

import torch
from torch import Tensor

MARKS = {"empty": ("…", "#767676"), "not yet": ("✗", "#D55E00"), "right": ("✓", "#0072B2")}


@dataclass(frozen=True)
class Checked:
    """What a check says of an exercise. state: "empty", "not yet" or "right"; line: one or two sentences."""

    exercise: str
    state: str
    line: str

    def __repr__(self) -> str:
        return f"{MARKS[self.state][0]} {self.exercise}: {self.line}"

    def _repr_html_(self) -> str:
        style = f"border-left: 4px solid {MARKS[self.state][1]}; padding: 0.3em 0.8em"
        return f'<div style="{style}">{html.escape(repr(self))}</div>'


class NotYet(Exception):
    """An answer that is not right; the message is the line that the student reads."""


class Empty(Exception):
    """Nothing is filled in; the message is the line that the student reads."""


def check(exercise: str):
    """Make a `Checked` of a function that returns the line for a right answer and raises NotYet or Empty otherwise."""

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
    """The student's function on these arguments; an error inside it becomes a line."""
    if not callable(function):
        raise NotYet(f"a function is wanted (def …), yours is {short(function)}")
    try:
        result = function(*arguments)
    except Exception as error:  # whatever a student's code may raise
        shapes = ", ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else str(a) for a in arguments)
        raise NotYet(
            f"your function stopped with {type(error).__name__}: {short(error)} (it was given {shapes})"
        ) from None
    if result is None or result is ...:
        raise Empty("nothing comes back yet. Fill in the function (it ends with return …) and run both cells.")
    return result


def tensor(found) -> Tensor:
    """The answer as a tensor, or NotYet."""
    try:
        return torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        raise NotYet(f"a tensor is wanted, yours is {short(found)}") from None


def shaped(found: Tensor, shape, words: str) -> None:
    """NotYet for another shape than `shape`, which `words` explain."""
    if found.shape != shape:
        raise NotYet(f"the shape is {tuple(found.shape)}; wanted is {words}, here {tuple(shape)}")


def number(found) -> float:
    """The answer as one number, or NotYet."""
    try:
        value = float(found)
    except (TypeError, ValueError, RuntimeError):
        raise NotYet(f"one number is wanted, yours is {short(found)}") from None
    if math.isnan(value):
        raise NotYet("your number is NaN: something was divided by nothing, or taken of an empty set")
    return value


def whole(found, what: str) -> int:
    """The answer as a whole number, or NotYet; `what` says of what."""
    value = number(found)
    if not value.is_integer():
        raise NotYet(f"{what} is wanted, a whole number, yours is {value:g}")
    return int(value)


def compare(found: Tensor, truth: Tensor, mistakes: dict[str, Tensor], what: str) -> None:
    """Raise NotYet unless close to the truth: with the line of the mistake that it equals, else with the gap."""
    found, near = found.to(truth.dtype), dict(rtol=1e-3, atol=1e-5)
    if torch.allclose(found, truth, **near):
        return
    for line, wrong in mistakes.items():
        if wrong.shape == found.shape and torch.allclose(found, wrong, **near):
            raise NotYet(line)
    gap = (found - truth).abs().max().item()
    raise NotYet(f"the shape is right, the {what} are not: the largest difference is {gap:.3g}")


def compare_numbers(found: float, truth: float, mistakes: dict[str, float], what: str) -> None:
    """The same for one number, within one part in a hundred."""
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
