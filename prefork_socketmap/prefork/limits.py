"""The limits that the process model keeps: what it reads of a configuration."""

from __future__ import annotations

from typing import Protocol


class Limits(Protocol):
    """Times in seconds; 0 switches a limit off. ``prefork_socketmap.Config`` has all of them, and documents them."""

    @property
    def process_limit(self) -> int: ...  # noqa: D102
    @property
    def min_spare(self) -> int: ...  # noqa: D102
    @property
    def max_use(self) -> int: ...  # noqa: D102
    @property
    def max_idle(self) -> float: ...  # noqa: D102
    @property
    def max_connections(self) -> int: ...  # noqa: D102
    @property
    def max_parked(self) -> int: ...  # noqa: D102
    @property
    def park_timeout(self) -> float: ...  # noqa: D102
    @property
    def idle_timeout(self) -> float: ...  # noqa: D102
    @property
    def lookup_timeout(self) -> float: ...  # noqa: D102
    @property
    def stop_timeout(self) -> float: ...  # noqa: D102
    @property
    def backlog(self) -> int: ...  # noqa: D102
