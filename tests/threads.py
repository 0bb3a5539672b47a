"""Threads that go on until a test has seen enough."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

_LAST_WORDS = 60.0  # seconds


class Threads:
    """Threads that run for as long as the context lasts: each target returns soon after ``enough`` is set."""

    def __init__(self, targets: Sequence[Callable[[], None]]) -> None:
        self.enough = threading.Event()
        self._threads = [threading.Thread(target=target) for target in targets]

    @property
    def are_alive(self) -> bool:
        """Whether none has ended."""
        return all(thread.is_alive() for thread in self._threads)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.enough.set()
        for thread in self._threads:
            thread.join(_LAST_WORDS)
