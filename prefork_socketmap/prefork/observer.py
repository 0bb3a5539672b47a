"""Whom the master tells what happens to it."""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger("prefork_socketmap.master")


class Observer:
    """What the embedding program wants to know of the master's life. Called in the master's process."""

    def ready(self, generation: int) -> None:
        """The first generation serves."""

    def reloading(self) -> None:
        """A reload, or an upgrade, begins."""

    def reloaded(self, generation: int, problem: str | None) -> None:
        """It is over: *generation* serves now; *problem* is the reason when the change was refused."""

    def stopping(self) -> None:
        """The server stops serving."""

    def due(self, now: float) -> float:  # noqa: ARG002
        """Do what is to be done regularly, at *now* on the monotonic clock; return when to be called again."""
        return float("inf")


def tell(event: Callable[[], None]) -> None:
    """Tell an observer of *event*. What goes wrong there is no reason to stop serving."""
    try:
        event()
    except Exception:
        log.exception("after-effects of a change of state are incomplete")
