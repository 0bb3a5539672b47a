"""What a map remembers of its answers, as the command ``cache`` shows it and has it forgotten.

A map that has ``cache_ttl`` and the like has such a memory without doing anything for it (``cache``). A type with a
memory of its own returns it from ``Map.memory``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from prefork_socketmap.socketmap.messages import Reply


class Remembered(NamedTuple):
    """An answer that is remembered. Times are in seconds since the epoch."""

    key: str
    """The key as it is remembered: folded, if the map folds."""
    reply: Reply
    stored: float
    fresh_until: float
    """Until then it spares a lookup,"""
    kept_until: float
    """and until then it stands in for one that fails."""


class Memory(Protocol):
    """What a map remembers. All of these raise OSError when the memory cannot be read or written.

    Keys are as ``Map.remembered_key`` returns them. The map is built, but not open.
    """

    def recall(self, key: str) -> Remembered | None:
        """Return what is remembered of *key*; None if nothing is."""

    def recall_all(self) -> Iterator[Remembered]:
        """Iterate over all that is remembered, in no order."""

    def forget(self, key: str) -> bool:
        """Forget what is remembered of *key*, in all processes at once; return whether it was anything."""

    def forget_all(self) -> int:
        """Forget everything, in all processes at once; return how many answers it was."""
