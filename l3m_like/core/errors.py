"""The one error type that a user is meant to read, and the near-match hint that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: the message names the place, the value and the fix. Launchers print it once, without a traceback."""


class Stopped(UserError):
    """A signal ended the run before its last step; it was saved, and the same command goes on from there."""


def did_you_mean(name: str, options: Iterable[str], *, most: int = 8) -> str:
    """A hint for a wrong ``name``: the nearest of ``options``, or the options themselves when nothing is near."""
    names = sorted({str(option) for option in options})
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"Did you mean '{near[0]}'?"
    if not names:
        return "None are available."
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"Available: {', '.join(names[:most])}{more}."
