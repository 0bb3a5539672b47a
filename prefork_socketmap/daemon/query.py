"""The command ``query``: ask a server, or a map of a config file; output and exit code tell the answer."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator

from prefork_socketmap.client import TIMEOUT, LookupFailed, LookupTimeout, PermFail, SocketmapClient
from prefork_socketmap.daemon import configfile, log, trust
from prefork_socketmap.daemon.configfile import LogSettings
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import to_bytes, to_text

FOUND = os.EX_OK
NOT_FOUND = 1

logger = logging.getLogger("prefork_socketmap.query")

LookUp = Callable[[str], str | None]


class _UsageError(Exception):
    """The command line asks for what cannot be."""


def query(arguments: argparse.Namespace) -> int:
    """Look up a key, or all keys on standard input; return the exit code. Raises SettingError for a wrong file."""
    try:
        with _map_of_file(arguments) if arguments.config else _map_of_server(arguments) as look_up:
            if arguments.key == "-":
                return _print_all(look_up, (to_text(line.rstrip(b"\r\n")) for line in sys.stdin.buffer))
            return _print_one(look_up, os.fsencode(arguments.key))
    except (_UsageError, LookupFailed, OSError) as error:
        print(f"prefork-socketmap: {arguments.map}: {error}", file=sys.stderr)
        return _exit_code(error)


@contextlib.contextmanager
def _map_of_server(arguments: argparse.Namespace) -> Iterator[LookUp]:
    if arguments.verbose:
        raise _UsageError("a server does not tell how it looks up; -v goes with -c")
    # Split at the last colon, as Postfix does.
    endpoint, colon, name = arguments.map.rpartition(":")
    if not colon or not name:
        raise _UsageError("expected ENDPOINT:MAP, such as inet:127.0.0.1:27823:virtual; or -c FILE and a map of it")
    try:
        client = SocketmapClient(endpoint, timeout=TIMEOUT if arguments.timeout is None else arguments.timeout)
    except SettingError as error:
        raise _UsageError(str(error)) from error
    with client:
        yield lambda key: client.lookup(name, key)


@contextlib.contextmanager
def _map_of_file(arguments: argparse.Namespace) -> Iterator[LookUp]:
    # Imported only for this: it brings the maps.
    from prefork_socketmap.daemon import direct

    if arguments.timeout is not None:
        raise _UsageError("--timeout is for a server; with -c the map's own timeout holds")

    lines = LogSettings(to="stderr", level="debug" if arguments.verbose else "warning", budget=0)
    log.set_up("query", lines, waits=True)
    settings = configfile.load(arguments.config)
    for warning in trust.examine(settings):
        logger.warning(warning)  # each is a kind of its own
    try:
        look_up = direct.open_map(settings, arguments.map)
    except KeyError:
        raise _UsageError("there is no such map; the file has: " + ", ".join(settings.maps)) from None
    yield look_up


def _print_one(look_up: LookUp, key: bytes) -> int:
    value = look_up(to_text(key))
    if value is None:
        return NOT_FOUND
    _print(to_bytes(value))
    return FOUND


def _print_all(look_up: LookUp, keys: Iterable[str]) -> int:
    """Print ``key TAB value`` for each key that is found, like ``postmap -q -``; not found if none is."""
    code = NOT_FOUND
    for key in keys:
        value = look_up(key)
        if value is not None:
            _print(to_bytes(key) + b"\t" + to_bytes(value))
            code = FOUND
    return code


def _print(line: bytes) -> None:
    # Bytes, because neither keys nor values have to be text in the locale's encoding.
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _exit_code(error: Exception) -> int:
    match error:
        case _UsageError():
            return os.EX_USAGE
        case LookupTimeout():
            return os.EX_UNAVAILABLE
        case PermFail():
            return os.EX_CONFIG
        case _:
            return os.EX_TEMPFAIL
