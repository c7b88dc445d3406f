"""Values of notebook parameters: converted where the meaning is clear, else refused before anything runs."""

import math

from ..base import UserError

COUNTS = ("n_", "steps", "rounds", "batch_size", "grid_in", "grid_out")  # prefixes of names for which 0 makes no sense


def taken(name: str, default, value):
    """`value` as the type of `default`, where its meaning is clear: 4 for a text is "4", "64" for a number is 64.

    Raises UserError where it is not, for a number that is not finite, and for a negative count.
    """
    kind = type(default)
    try:
        if kind is bool:
            value = {"true": True, "false": False, "0": False, "1": True}[str(value).lower()]
        elif kind is str:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError
            value = str(value)
        else:
            number = float(value) if not isinstance(value, bool) else math.nan
            if not math.isfinite(number) or (kind is int and number != int(number)):
                raise ValueError
            value = kind(number) if not isinstance(value, int) else kind(value)
    except (ValueError, TypeError, KeyError):
        article = "an" if kind is int else "a"
        raise UserError(
            f"parameter {name} is {value!r} ({type(value).__name__}), but {article} {kind.__name__} is wanted, "
            f"as in {default!r}"
        ) from None
    if kind is int and default >= 0:
        least = 1 if default > 0 and name.startswith(COUNTS) else 0
        if value < least:
            raise UserError(f"parameter {name} is {value}, but at least {least} is wanted")
    return value
