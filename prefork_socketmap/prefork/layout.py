"""The number of a layout of shared memory: made from the layout itself, so that nobody can forget to change it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping


def fingerprint(*parts: object) -> int:
    """Return a number for *parts*, which are equal when their texts are."""
    return zlib.crc32(repr(parts).encode())


def constants(names: Mapping[str, object]) -> list[tuple[str, int]]:
    """Return the whole numbers among *names*, a module's or a class's: sizes, places and indexes are constants."""
    return sorted(
        (name, value) for name, value in names.items() if type(value) is int and name == name.upper() != "LAYOUT"
    )
