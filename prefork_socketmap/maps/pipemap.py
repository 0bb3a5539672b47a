"""The type ``pipemap``: maps of which each looks up what the one before it has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefork_socketmap import settings
from prefork_socketmap.maps.base import values_in
from prefork_socketmap.maps.members import MembersMap


class PipeMap(MembersMap):
    """Answers with what the last of ``maps`` finds; not found if any of them does not find its key."""

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        super().__init__(name, table, base)
        if not self.maps:
            raise settings.wrong(f"maps.{name}.maps", [], "a list of at least one map")

    def find(self, key: str) -> Sequence[str] | None:
        """Pass *key*, and then each answer, on to the next map."""
        for member in self.members:
            values = values_in(member.lookup(key))
            if values is None:
                return None
            (key,) = values
        return (key,)
