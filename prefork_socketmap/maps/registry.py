"""From the tables of the config file to maps: which class stands behind which ``type``.

A class is imported when a map of its type is built, and not before: the libraries behind the other types need not be
installed. Other packages add types with entry points in the group ``prefork_socketmap.maps``, whose names are the
types and whose objects are subclasses of ``Map``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from prefork_socketmap import settings
from prefork_socketmap.maps.base import Map, MissingLibraryError
from prefork_socketmap.maps.unavailable import UnavailableMap

GROUP = "prefork_socketmap.maps"

# Not entry points of our own: a checkout works without being installed, and nothing has to be searched for them.
_BUILT_IN = {
    "cdb": "prefork_socketmap.maps.cdb:CdbMap",
    "chain": "prefork_socketmap.maps.chain:ChainMap",
    "cidr": "prefork_socketmap.maps.cidr:CidrMap",
    "file": "prefork_socketmap.maps.file:FileMap",
    "http": "prefork_socketmap.maps.http:HttpMap",
    "ldap": "prefork_socketmap.maps.ldap:LdapMap",
    "lmdb": "prefork_socketmap.maps.lmdb:LmdbMap",
    "memcache": "prefork_socketmap.maps.memcache:MemcacheMap",
    "mysql": "prefork_socketmap.maps.mysql:MysqlMap",
    "pcre": "prefork_socketmap.maps.pcre:PcreMap",
    "pipemap": "prefork_socketmap.maps.pipemap:PipeMap",
    "postgresql": "prefork_socketmap.maps.postgresql:PostgresqlMap",
    "python": "prefork_socketmap.maps.python:PythonMap",
    "randmap": "prefork_socketmap.maps.randmap:RandMap",
    "redis": "prefork_socketmap.maps.redis:RedisMap",
    "regexp": "prefork_socketmap.maps.regexp:RegexpMap",
    "sqlite": "prefork_socketmap.maps.sqlite:SqliteMap",
    "srs": "prefork_socketmap.maps.srs:SrsMap",
    "static": "prefork_socketmap.maps.static:StaticMap",
    "unionmap": "prefork_socketmap.maps.unionmap:UnionMap",
}


def build(
    tables: Mapping[str, Mapping[str, object]],
    base: Path | None = None,
    on_missing: Callable[[MissingLibraryError], None] | None = None,
) -> dict[str, Map]:
    """Make the maps of a config file; *tables* are its ``[maps.NAME]`` tables, by name.

    Relative paths in them begin at *base*, by default the working directory. The maps are not open yet. Raises
    SettingError for the first thing that is wrong, its key beginning with ``maps.NAME``.

    With *on_missing*, a map that lacks its library is no error: *on_missing* is told, and the map answers PERM.
    """
    maps: dict[str, Map] = {}
    for name, table in tables.items():
        try:
            maps[name] = _build(name, table, base or Path.cwd())
        except MissingLibraryError as error:
            if on_missing is None:
                raise
            on_missing(error)
            maps[name] = UnavailableMap(name, str(error))
    for each in maps.values():
        each.link(maps)
    return maps


def _build(name: str, table: Mapping[str, object], base: Path) -> Map:
    if not name or " " in name:
        raise settings.SettingError(f"maps.{name!r}", "the name of a map is a word without spaces")
    key = f"maps.{name}.type"
    if "type" not in table:
        raise settings.SettingError(key, "is missing")
    kind = settings.text(key, table["type"])
    rest = {setting: value for setting, value in table.items() if setting != "type"}
    return _load(key, kind)(name, rest, base)


def _load(key: str, kind: str) -> type[Map]:
    """Return the class behind the type *kind*; *key* is where that stands."""
    path = _BUILT_IN.get(kind) or _entry_points().get(kind)
    if path is None:
        raise settings.wrong(key, kind, "one of " + ", ".join(sorted(_BUILT_IN.keys() | _entry_points().keys())))
    try:
        module, _, name = path.partition(":")
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise MissingLibraryError(key, _missing(kind, error)) from error
    if not (isinstance(found, type) and issubclass(found, Map)):
        raise settings.SettingError(key, f"{path} is not a subclass of {Map.__module__}.Map")
    return found


def _entry_points() -> dict[str, str]:
    # For types of others only: to load it takes as long as all the rest of a worker's start.
    import importlib.metadata

    return {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)}


def _missing(kind: str, error: ImportError) -> str:
    if closed := _closed_directory():
        user = f"the user {os.geteuid()}, whom it runs as, cannot read {closed}, where Python's modules are"
        return f'type "{kind}" cannot be loaded ({error}): {user}'
    if (error.name or "").lstrip("_") in sys.stdlib_module_names:
        return f'type "{kind}" cannot be loaded ({error}): a part of Python\'s own library is not installed'
    hint = f"; install prefork-socketmap[{kind}]" if kind in _BUILT_IN else ""
    return f'type "{kind}" needs a Python package that is not there ({error}){hint}'


def _closed_directory() -> str | None:
    """Return the first place to import from that is closed to this user, if there is one."""
    for directory in sys.path:
        try:
            with os.scandir(directory or "."):
                pass
        except PermissionError:
            return directory
        except OSError:
            continue  # an archive, or nothing
    return None
