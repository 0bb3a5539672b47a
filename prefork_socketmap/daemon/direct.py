"""A map of the config file, asked in this process: the command ``query`` with no server.

What a lookup returns or raises is reported as a server would report it, in the words of the client.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from prefork_socketmap.client import LookupTimeout, TempFail, value_of
from prefork_socketmap.daemon.check import describe
from prefork_socketmap.daemon.configfile import DEFAULT_MAP, Settings, errors_in
from prefork_socketmap.daemon.worker import build_maps
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import InvalidReplyError, Reply, printable

if TYPE_CHECKING:
    from prefork_socketmap.maps.base import Map

logger = logging.getLogger("prefork_socketmap.query")


def open_map(settings: Settings, name: str) -> Callable[[str], str | None]:
    """Return the lookup function of the map that a server would ask for *name*; only that map is opened.

    The function returns a value, or None for "not found", and raises what a ``SocketmapClient`` raises. Raises
    SettingError when a table is wrong or the map cannot be opened, KeyError when there is no such map.
    """
    maps = build_maps(settings, run_as=None, on_missing=lambda _error: None)
    table = maps[name if name in maps else DEFAULT_MAP]
    with errors_in(settings.path):
        _open(table)

    def look_up(key: str) -> str | None:
        return value_of(_ask(table, key, settings.config.max_reply_size))

    return look_up


def _open(table: Map) -> None:
    try:
        table.open()
    except SettingError:
        raise
    except (Exception, SystemExit) as error:  # user code
        raise SettingError(f"maps.{table.name}", f"cannot be opened: {describe(error)}") from error


def answer(table: Map, key: str) -> Reply:
    """Return the reply of a server to *key* in *table*, whatever the lookup raises."""
    try:
        return _ask(table, key, 0)
    except LookupTimeout as error:
        return Reply.timeout(str(error))
    except TempFail as error:
        return Reply.temp_fail(str(error))


def _ask(table: Map, key: str, max_reply_size: int) -> Reply:
    try:
        reply = table.lookup(key)
        reply.encode(max_reply_size)
    except InvalidReplyError as error:
        raise TempFail(f"the map returned {error}") from error
    except TimeoutError as error:
        raise LookupTimeout("lookup timed out") from error
    except (Exception, SystemExit) as error:
        logger.exception("map <%s>, key <%s>: lookup failed", table.name, printable(key))
        raise TempFail("lookup failed") from error
    return reply
