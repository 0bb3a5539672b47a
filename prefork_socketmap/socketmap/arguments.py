"""Wrong arguments of the codec: told with the argument, what came and what is accepted."""

from __future__ import annotations

from types import UnionType


def expect(argument: str, found: object, kinds: type | UnionType, accepted: str) -> None:
    """Raise a TypeError unless *found* is of one of *kinds*."""
    if not isinstance(found, kinds) or isinstance(found, bool):
        raise TypeError(f"{argument}: type {type(found).__name__} is not accepted here; expected {accepted}")


def expect_bytes(argument: str, found: object) -> None:
    """Raise a TypeError unless *found* is bytes."""
    expect(argument, found, bytes, "bytes")


def expect_size(argument: str, found: int) -> None:
    """Raise a TypeError or a ValueError unless *found* is a number of bytes."""
    expect(argument, found, int, "a number of bytes")
    if found < 0:
        raise ValueError(f"{argument}: {found} is not accepted here; expected a number of bytes")
