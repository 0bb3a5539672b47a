"""What the map types have in common that ask other maps of the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefork_socketmap import settings
from prefork_socketmap.maps.base import Map
from prefork_socketmap.maps.setting import setting


def _names(key: str, value: object) -> tuple[str, ...]:
    names = settings.texts(key, value)
    if not names:
        raise settings.wrong(key, value, "a list of at least one map")
    return names


class MembersMap(Map):
    """A map whose answers are made from those of ``maps``."""

    maps = setting(_names)
    """Names of maps, in the order in which they are asked."""
    fold = setting(settings.boolean, False)
    """Off: the maps fold for themselves."""

    takes_any_key = True
    members: Sequence[Map] = ()

    def link(self, maps: Mapping[str, Map]) -> None:
        """Find the maps. Raises SettingError for one that is not there, or leads back to this one."""
        key = f"maps.{self.name}.maps"
        if unknown := [name for name in self.maps if name not in maps]:
            raise settings.SettingError(key, f"there is no map {settings.shown(unknown[0])}")
        self.members = [maps[name] for name in self.maps]
        if self in self._reachable():
            raise settings.SettingError(key, f"{self.name!r} leads back to itself")

    def prepare(self) -> None:
        """Open the maps."""
        for member in self.members:
            member.open()

    def _reachable(self) -> set[Map]:
        found: set[Map] = set()
        ahead = list(self.members)
        while ahead:
            member = ahead.pop()
            if member not in found:
                found.add(member)
                ahead += member.members if isinstance(member, MembersMap) else ()
        return found
