"""The command ``cache``: what a map remembers is listed, looked at, or forgotten.

A map's cache is that of the running server, in its memory, or else the one in ``cache_file``. What else a map
remembers is its own business: the command knows a ``Memory`` and nothing more.

Keys and values are what strangers have sent or set. In the lines that are printed, whatever is not printable, and a
backslash, is an escape, so that no key looks like another one, and none like two lines or columns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

from prefork_socketmap.daemon import cachefile, configfile, trust
from prefork_socketmap.daemon.configfile import Settings
from prefork_socketmap.daemon.identity import Sought, UnidentifiedError
from prefork_socketmap.daemon.journal import complain
from prefork_socketmap.daemon.worker import build_maps
from prefork_socketmap.maps import store
from prefork_socketmap.maps.base import Map
from prefork_socketmap.maps.memory import Memory, Remembered
from prefork_socketmap.maps.store import Shared
from prefork_socketmap.socketmap.messages import printable, to_bytes, to_text

NOT_REMEMBERED = 1


class _NothingError(Exception):
    """There is nothing to look at; the text says why."""


def cache(arguments: argparse.Namespace) -> int:
    """Do what the command line says; return the exit code. Raises SettingError for a wrong file, and OSError."""
    action, key = arguments.action, arguments.key
    if (action == "list" and key is not None) or (action == "get" and key is None):
        problem = f"{action} {'needs a KEY' if key is None else 'takes no KEY'}"
        return complain(problem, os.EX_USAGE)
    settings = configfile.load(arguments.config)
    try:
        table = _map(settings, arguments.map)
        memory = _memory(table, settings, arguments)
    except _NothingError as problem:
        return complain(f"{printable(arguments.map)}: {problem}", os.EX_UNAVAILABLE)
    except UnidentifiedError as problem:
        return complain(str(problem), os.EX_UNAVAILABLE)
    if key is not None:
        key = table.remembered_key(to_text(os.fsencode(key)))
    if action == "purge":
        return _purge(memory, key, as_json=arguments.json)
    found = memory.recall_all() if key is None else filter(None, [memory.recall(key)])
    lines = 0
    for each in found:
        _print(json.dumps(_document(each)) if arguments.json else _line(each))
        lines += 1
    return os.EX_OK if lines or key is None else NOT_REMEMBERED


def _map(settings: Settings, name: str) -> Map:
    maps = build_maps(settings, run_as=None, on_missing=lambda _error: None)
    if name not in maps:
        raise _NothingError("there is no such map; the file has: " + ", ".join(maps))
    return maps[name]


def _memory(table: Map, settings: Settings, arguments: argparse.Namespace) -> Memory:
    """Return what *table* remembers, its cache being the one that a server uses, or has used."""
    memory = table.memory()
    if memory is None:
        raise _NothingError("it remembers nothing: neither cache_ttl, negative_cache_ttl nor stale_ttl is set")
    cache = table.cache
    if cache is not None and memory is cache:
        sought = Sought.of(arguments.config, arguments.pid_file)
        cache.share(_cache_of_server(sought, arguments.map) or _cache_in_file(settings, arguments.map, sought))
    return memory


def _cache_of_server(sought: Sought, name: str) -> Shared | None:
    """Return the cache of the map *name* that is in the memory of the running server, if any is."""
    with sought.find() as server:
        for link in Path(f"/proc/{server.pid}/fd").iterdir() if server else ():
            with contextlib.suppress(FileNotFoundError):  # it has been closed
                if str(link.readlink()).startswith(f"/memfd:{store.MEMORY} ") and (found := _cache_at(link, name)):
                    return found
    return None


def _cache_at(link: Path, name: str) -> Shared | None:
    """Return the cache that *link* leads to if it is that of the map *name*, and in use."""
    fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
    identity = store.published(fd)
    if identity and store.label(fd) == store.labelled(name):
        try:
            return store.shared(fd, identity)
        except ValueError as error:
            raise _NothingError(f"what the server has {error}") from None
    os.close(fd)
    return None


def _cache_in_file(settings: Settings, name: str, sought: Sought) -> Shared:
    path = trust.cache_file(trust.tables(settings)[name], settings.base)
    if path is None:
        problem = sought.other() or "the server does not run"
        raise _NothingError(f"{problem}, and the map has no cache_file: nothing is remembered")
    try:
        found = cachefile.open_existing(path)
    except FileNotFoundError:
        raise _NothingError(f"there is no {path} yet: nothing is remembered") from None
    except ValueError as error:
        raise _NothingError(f"{path} {error}") from None
    return found._replace(identity=store.published(found.fd))


def _purge(memory: Memory, key: str | None, *, as_json: bool) -> int:
    number = memory.forget_all() if key is None else int(memory.forget(key))
    words = f"{number} answer{'s' if number != 1 else ''} forgotten"
    _print(json.dumps({"forgotten": number}) if as_json else words)
    return os.EX_OK if number or key is None else NOT_REMEMBERED


def _line(each: Remembered) -> str:
    now = time.time()
    state, left = ("fresh", each.fresh_until - now) if now < each.fresh_until else ("stale", each.kept_until - now)
    cells = (_quoted(each.key), each.reply.status.value, state, f"{left:.0f}", _quoted(each.reply.text))
    return "\t".join(cells)


def _quoted(text: str) -> str:
    return printable(text.replace("\\", r"\\"))


def _document(each: Remembered) -> dict[str, object]:
    return {
        "key": each.key,
        "status": each.reply.status.value,
        "value": each.reply.text,
        "stored": each.stored,
        "fresh_until": each.fresh_until,
        "kept_until": each.kept_until,
    }


def _print(line: str) -> None:
    # Whatever the locale: the escapes are for what nobody could read, not for what this terminal cannot show.
    sys.stdout.buffer.write(to_bytes(f"{line}\n"))
