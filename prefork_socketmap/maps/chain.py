"""The type ``chain``: several maps asked in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefork_socketmap import settings
from prefork_socketmap.maps.base import Map, values_in
from prefork_socketmap.maps.setting import setting


class ChainMap(Map):
    """Answers with the first of ``maps`` that finds something.

    A map that fails ends the search: what the maps behind it would say is no answer to this key. With ``search`` on
    the chain itself, each key is tried in all maps before the next key, as Postfix does when a parameter names
    several tables; with ``search`` on its maps, each map tries all keys before the next map is asked.
    """

    maps = setting(settings.texts)
    """Names of maps, in the order in which they are asked."""
    fold = setting(settings.boolean, False)
    """Off: the maps of the chain fold for themselves."""

    takes_any_key = True
    _members: Sequence[Map] = ()

    def link(self, maps: Mapping[str, Map]) -> None:
        """Find the maps of the chain. Raises SettingError for one that is not there, or leads back to this one."""
        key = f"maps.{self.name}.maps"
        if unknown := [name for name in self.maps if name not in maps]:
            raise settings.SettingError(key, f"there is no map {unknown[0]!r}")
        self._members = [maps[name] for name in self.maps]
        if self in self._reachable():
            raise settings.SettingError(key, f"{self.name!r} leads back to itself")

    def prepare(self) -> None:
        """Open the maps of the chain."""
        for member in self._members:
            member.open()

    def find(self, key: str) -> Sequence[str] | None:
        """Return what the first map that finds *key* answers."""
        for member in self._members:
            values = values_in(member.lookup(key))
            if values is not None:
                return values
        return None

    def _reachable(self) -> set[Map]:
        found: set[Map] = set()
        ahead = list(self._members)
        while ahead:
            member = ahead.pop()
            if member not in found:
                found.add(member)
                ahead += member._members if isinstance(member, ChainMap) else ()
        return found
