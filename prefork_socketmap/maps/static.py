"""The type ``static``: entries in the config file itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefork_socketmap import settings
from prefork_socketmap.maps.base import Map
from prefork_socketmap.maps.setting import setting


def _entries(key: str, value: object) -> dict[str, tuple[str, ...]]:
    """Read a table whose values are a string or a list of strings."""
    return {entry: _values(f"{key}.{entry}", found) for entry, found in settings.table(key, value).items()}


def _values(key: str, value: object) -> tuple[str, ...]:
    return settings.texts(key, value) if isinstance(value, list) else (settings.text(key, value),)


class StaticMap(Map):
    """Answers from ``entries``, a table of keys and their value, or list of values."""

    entries = setting(_entries)

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        super().__init__(name, table, base)
        if self.fold:
            self.entries = {key.casefold(): values for key, values in self.entries.items()}

    def find(self, key: str) -> Sequence[str] | None:
        """Return the values of the entry *key*."""
        return self.entries.get(key)
