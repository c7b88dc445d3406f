"""Errors a user can mend: one line that names the value, the valid ones and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Shown as one line by the command line, without a traceback."""


def unknown(kind: str, value: str, valid: Iterable[str], hint: str = "") -> UserError:
    """An error for an unknown name, with the nearest valid ones (or all, where there are few)."""
    valid = sorted(valid)
    near = difflib.get_close_matches(value, valid, n=3, cutoff=0.5)
    if near:
        text = f"did you mean {' or '.join(near)}?"
    else:
        text = "known: " + ", ".join(valid[:20]) + (" …" if len(valid) > 20 else "")
    return UserError(f"unknown {kind} {value!r}: {text}{' ' + hint if hint else ''}")
