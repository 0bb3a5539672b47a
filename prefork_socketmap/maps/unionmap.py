"""The type ``unionmap``: what several maps answer, together."""

from __future__ import annotations

from collections.abc import Sequence

from prefork_socketmap.maps.base import values_in
from prefork_socketmap.maps.members import MembersMap


class UnionMap(MembersMap):
    """Answers with what each of ``maps`` finds; not found if none does. A map that fails ends the lookup."""

    def find(self, key: str) -> Sequence[str] | None:
        """Return what all maps answer for *key*."""
        return [value for member in self.members for value in values_in(member.lookup(key)) or ()]
