"""Tests with random input: a few seconds in the normal run, and as long as you like with ``FUZZ_MINUTES``.

``FUZZ_MINUTES=60 pytest tests/fuzz`` runs each of them for an hour, on new examples all the time. One that fails is
printed in its smallest form, and kept in ``.hypothesis``, so the next run begins with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

MINUTES = float(os.environ.get("FUZZ_MINUTES", "0"))

# A long run is meant to be longer than a test may be.
unlimited = pytest.mark.timeout(0 if MINUTES else None)


def repeat(check: Callable[[], None]) -> None:
    """Run *check*, a test by hypothesis, once, and again and again as long as ``FUZZ_MINUTES`` says."""
    end = time.monotonic() + MINUTES * 60
    check()
    while time.monotonic() < end:
        check()
