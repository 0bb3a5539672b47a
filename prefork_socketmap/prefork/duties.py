"""Duties: what the master's loop does when its time has come, and not because something happened."""

from __future__ import annotations

from collections.abc import Callable

Duty = Callable[[float], float]
"""Does what is due at a time, and returns when it wants to be done again; infinity: when somebody makes it due."""


class Duties:
    """Duties and the times they are due, in seconds of the monotonic clock. A new one is due at once."""

    def __init__(self, *duties: Duty) -> None:
        self._due = dict.fromkeys(duties, 0.0)

    def make_due(self, duty: Duty, when: float = 0.0) -> None:
        """Have *duty* done at *when*, or earlier if it is due earlier."""
        self._due[duty] = min(self._due[duty], when)

    def make_all_due(self) -> None:
        """Have all of them done next: something has happened that may matter to any."""
        self._due = dict.fromkeys(self._due, 0.0)

    def next(self) -> float:
        """Return when the next one is due."""
        return min(self._due.values())

    def do(self, now: float) -> None:
        """Do what is due."""
        for duty, due in self._due.items():
            if now >= due:
                self._due[duty] = duty(now)
