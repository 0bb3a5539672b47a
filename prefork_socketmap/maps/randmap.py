"""The type ``randmap``: one of several values, whatever the key."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefork_socketmap import settings
from prefork_socketmap.maps.base import Map
from prefork_socketmap.maps.setting import setting


class RandMap(Map):
    """Answers every key with one of ``results``, each as often as the others."""

    results = setting(settings.texts)
    """The values."""

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        super().__init__(name, table, base)
        if not self.results:
            raise settings.wrong(f"maps.{name}.results", [], "a list of at least one string")
        # Workers are forks of one process, and shall not all draw the same.
        self._random = random.SystemRandom()

    def find(self, key: str) -> Sequence[str] | None:  # noqa: ARG002
        """Draw a value."""
        return (self._random.choice(self.results),)
