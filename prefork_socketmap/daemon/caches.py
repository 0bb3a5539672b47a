"""The caches that workers share: made by the master, before it forks, for each map whose table asks for one.

The master makes the files and hands their descriptors on; it does not look at what workers write there. A cache is in
a file without a name, which ends with the server and survives an upgrade, or, with ``cache_file``, in one that
survives the server. Which maps have one is seen from their tables as they stand in the config file: only workers
import what can check those. Of the maps this module knows how a store is laid out, and no more.

A map goes on with its cache through a reload if it has the same size and file. What its answers depend on, by and
large all else in its table, is their identity: when that has changed none of the old ones is found any more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from prefork_socketmap import settings as read
from prefork_socketmap.daemon import cachefile, trust
from prefork_socketmap.daemon.configfile import Settings, Table, in_file
from prefork_socketmap.maps import store
from prefork_socketmap.maps.store import Shared
from prefork_socketmap.prefork.plan import Observer
from prefork_socketmap.settings import SettingError

log = logging.getLogger("prefork_socketmap.master")

_DESCRIPTOR = "cache:"
"""Begins the names of the descriptors that an upgrade hands on; the map's name follows."""
_LOOK = 10.0  # seconds between two looks at the sizes of files
_NEVER = float("inf")

# What says nothing of what the right answer is, but how long it is kept, or how one gets at it.
_TIMES = ("cache_ttl", "negative_cache_ttl", "stale_ttl")
_CACHE = (*_TIMES, "cache_size", "cache_bytes", "cache_file")
_CONNECTIONS = ("connect", "timeout", "max_connections", "max_connection_idle", "max_workers_share")
_NOT_OF_ANSWERS = frozenset([*_CACHE, *_CONNECTIONS])
_SECRET = re.compile(r"(?:^|_)(?:password|passwd|pw|token|secret)(?:_file|_env)?$")
_SIZE = 10000  # "cache_size", if there is none


class Wish(NamedTuple):
    """The cache that a map's table asks for."""

    pages: int
    file: Path | None


class Cache(NamedTuple):
    """A cache that there is. ``file`` is where it has a name, if it has."""

    wish: Wish
    file: Path | None
    shared: Shared


def wish(table: Table, base: Path) -> Wish | None:
    """Return what a map's table asks for; None if that is no cache, or not right, which a worker will say."""
    try:
        times = [read.seconds(key, table.get(key, 0)) for key in _TIMES]
        size = read.count("cache_size", table.get("cache_size", _SIZE))
        room = read.count("cache_bytes", table.get("cache_bytes", 0))
    except SettingError:
        return None
    return Wish(store.pages_for(size, room), trust.cache_file(table, base)) if size and any(times) else None


def wishes(settings: Settings) -> dict[str, Wish]:
    """Return what all maps ask for, by name. Raises SettingError when two of them name the same file."""
    found: dict[str, Wish] = {}
    for name, table in trust.tables(settings).items():
        wished = wish(table, settings.base)
        if wished is None:
            continue
        for other, its in found.items():
            if wished.file and wished.file == its.file:
                problem = f"maps.{other} has the same file; each map needs one of its own"
                raise in_file(settings.path, SettingError(f"maps.{name}.cache_file", problem))
        found[name] = wished
    return found


def missing(settings: Settings) -> list[str]:
    """Return what is to be warned of: places for files that are not there."""
    files = {name: wished.file for name, wished in wishes(settings).items() if wished.file}
    problem = "{}: maps.{}.cache_file: there is no directory {}"
    return [
        problem.format(settings.path, name, file.parent) for name, file in files.items() if not file.parent.is_dir()
    ]


def identity(settings: Settings, name: str) -> bytes:
    """Return a number that changes with what the answers of the map *name* depend on, as far as can be told.

    That is what its table says, and those of the maps that it asks, the files of its code, and that of the secrets
    with which it signs.
    """
    import hashlib  # only if there is a cache

    tables = {each: trust.tables(settings)[each] for each in _reachable(trust.tables(settings), name)}
    told = {each: _of_answers(table) for each, table in tables.items()}
    base = settings.base
    files = [
        _state(path)
        for each in tables.values()
        for _, path in (*trust.code(each, base), *trust.signatures(each, base))
    ]
    text = json.dumps([name, str(base), told, files], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=store.IDENTITY_SIZE).digest()


def _reachable(tables: Mapping[str, Table], name: str) -> list[str]:
    found: list[str] = []
    ahead = [name]
    while ahead:
        each = ahead.pop()
        if each in tables and each not in found:
            found.append(each)
            members = tables[each].get("maps", ())
            ahead += [member for member in members if isinstance(member, str)] if isinstance(members, list) else []
    return found


def _of_answers(table: Table) -> Table:
    return {key: value for key, value in table.items() if key not in _NOT_OF_ANSWERS and not _SECRET.search(key)}


def _state(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return str(path)
    return str(path), None if path.is_dir() else (status.st_mtime_ns, status.st_size)


class Caches(Observer):
    """All caches of a server. What has been prepared for a new generation counts when that serves."""

    def __init__(self, descriptors: dict[str, int], handed_over: Mapping[str, int]) -> None:
        """*descriptors* is for those that an upgrade shall hand on, *handed_over* what one has."""
        self._descriptors = descriptors
        self._handed_over = {
            name.removeprefix(_DESCRIPTOR): fd for name, fd in handed_over.items() if name.startswith(_DESCRIPTOR)
        }
        self._current: dict[str, Cache] | None = None
        self._next: dict[str, Cache] = {}
        self._pending = contextlib.ExitStack()
        self._look_at = 0.0

    def prepare(self, settings: Settings) -> dict[str, Shared]:
        """Return the caches of a generation that is to be, by the names of maps. Raises SettingError, or OSError."""
        self._abandon()
        for name, wished in wishes(settings).items():
            found = self._find(name, wished)
            shared = found.shared._replace(identity=identity(settings, name))
            self._next[name] = found._replace(shared=shared)
        return {name: cache.shared for name, cache in self._next.items()}

    def ready(self, generation: int) -> None:  # noqa: ARG002 - an Observer
        """The first generation serves."""
        self._commit()

    def reloaded(self, generation: int, problem: str | None) -> None:  # noqa: ARG002
        """Another generation serves, or the old one goes on."""
        # After an upgrade the workers that go on are of a program that is gone: their successors have the new plan.
        if problem is None or self._current is None:
            self._commit()
        else:
            self._abandon()

    def due(self, now: float) -> float:
        """Cut off what a worker may have added to a file, to fill the disk."""
        files = [cache for cache in (self._current or {}).values() if cache.file]
        if files and now >= self._look_at:
            self._look_at = now + _LOOK
            for cache in files:
                with contextlib.suppress(OSError):
                    _cut(cache.shared)
        return self._look_at if files else _NEVER

    def _find(self, name: str, wished: Wish) -> Cache:
        """Return the cache that a map has already, if it is as wished, or else a new one."""
        current = (self._current or {}).get(name)
        if wished.file:
            if current and current.wish == wished and current.file:
                return current
            try:
                shared = cachefile.open_or_make(wished.file, name, wished.pages, self._pending)
                return Cache(wished, wished.file, shared)
            except OSError as error:
                problem = "maps.%s.cache_file: %s cannot be used, what is remembered ends with the server: %s"
                log.warning(problem, name, wished.file, error.strerror or error)
        if current and current.file is None and current.shared.pages == wished.pages:
            return current
        return Cache(wished, None, self._handed_over_to(name, wished) or _create(name, wished))

    def _handed_over_to(self, name: str, wished: Wish) -> Shared | None:
        """Return what the program that was here before had in memory, if it is as wished."""
        if name in self._handed_over:
            with contextlib.suppress(ValueError, OSError):
                shared = store.shared(self._handed_over[name])
                return shared if shared.pages == wished.pages else None
        return None

    def _commit(self) -> None:
        former = [cache.shared.fd for cache in (self._current or {}).values()]
        former += self._handed_over.values()
        self._current, self._next, self._handed_over = self._next, {}, {}
        self._close(former)
        for name in [name for name in self._descriptors if name.startswith(_DESCRIPTOR)]:
            del self._descriptors[name]
        for name, cache in self._current.items():
            if cache.file is None:
                self._descriptors[_DESCRIPTOR + name] = cache.shared.fd
            store.publish(cache.shared)
        pending, self._pending = self._pending, contextlib.ExitStack()
        pending.close()

    def _abandon(self) -> None:
        with contextlib.suppress(_AbandonedError), self._pending:
            raise _AbandonedError
        self._close([cache.shared.fd for cache in self._next.values()])
        self._next = {}

    def _close(self, descriptors: Iterable[int]) -> None:
        """Close *descriptors*, but for those that are in use."""
        used = [cache.shared.fd for cache in (self._current or {}).values()]
        for fd in descriptors:
            if fd not in used and fd not in self._handed_over.values():
                os.close(fd)


class _AbandonedError(Exception):
    """Undoes what was prepared."""


def _create(name: str, wished: Wish) -> Shared:
    return store.shared(store.create(name, wished.pages))


def _cut(shared: Shared) -> None:
    size = store.file_size(shared.pages)
    if os.fstat(shared.fd).st_size > size:
        log.error("a worker has made the file of a cache longer than it should be: it is cut off")
        os.ftruncate(shared.fd, size)
