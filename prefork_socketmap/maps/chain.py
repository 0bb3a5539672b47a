"""The type ``chain``: several maps asked in turn."""

from __future__ import annotations

from collections.abc import Sequence

from prefork_socketmap.maps.base import values_in
from prefork_socketmap.maps.members import MembersMap


class ChainMap(MembersMap):
    """Answers with the first of ``maps`` that finds something.

    A map that fails ends the search: what the maps behind it would say is no answer to this key. With ``search`` on
    the chain itself, each key is tried in all maps before the next key, as Postfix does when a parameter names
    several tables; with ``search`` on its maps, each map tries all keys before the next map is asked.
    """

    def find(self, key: str) -> Sequence[str] | None:
        """Return what the first map that finds *key* answers."""
        for member in self.members:
            values = values_in(member.lookup(key))
            if values is not None:
                return values
        return None
