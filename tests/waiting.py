"""Waiting in tests: for an event, with a deadline, instead of sleeping and hoping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Short against anything that is waited for, long enough to leave a small machine to the processes under test.
_PAUSE = 0.01


def eventually(check: Callable[[], T], within: float = 10.0, what: str = "") -> T:
    """Call *check* until it returns something true, and return that; an AssertionError after *within* seconds.

    *check* may raise AssertionError to say "not yet": the last one is the reason that is shown at the deadline.
    *what* names the event, where the check's own name or its assertion does not.
    """
    deadline = time.monotonic() + within
    while True:
        reason: AssertionError | None = None
        try:
            result = check()
        except AssertionError as error:
            reason = error
        else:
            if result:
                return result
        if time.monotonic() >= deadline:
            name = what or getattr(check, "__name__", repr(check))
            raise AssertionError(f"not within {within} s: {name}") from reason
        time.sleep(_PAUSE)
