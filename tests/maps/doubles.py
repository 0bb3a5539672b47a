"""Stand-ins: a map that answers from a dict and remembers what it is asked, a clock for tests; and damaged files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from prefork_socketmap.maps.base import Map


class DictMap(Map):
    """Answers from ``values``; raises ``error``, if there is one, instead."""

    def __init__(self, values: dict[str, list[str]], **table: object) -> None:
        super().__init__("test", table, Path())
        self.values = values
        self.asked: list[str] = []
        self.error: Exception | None = None

    def find(self, key: str) -> Sequence[str] | None:
        self.asked.append(key)
        if self.error is not None:
            raise self.error
        return self.values.get(key)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def damaged(whole: bytes, times: int, source: random.Random) -> bytes:
    """Return *whole* with a random byte at a random place, so many times."""
    found = bytearray(whole)
    for _ in range(times):
        found[source.randrange(len(whole))] = source.randrange(256)
    return bytes(found)
