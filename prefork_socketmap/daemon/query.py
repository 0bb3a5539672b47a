"""The command ``query``: ask a socketmap server, and tell by output and exit code what it answered."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable

from prefork_socketmap.client import LookupTimeout, PermFail, SocketmapClient, TempFail
from prefork_socketmap.prefork.listener import Endpoint
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import to_bytes, to_text

FOUND = os.EX_OK
NOT_FOUND = 1


def query(arguments: argparse.Namespace) -> int:
    """Look up a key, or all keys on standard input; return the exit code."""
    try:
        endpoint, name = _split(arguments.map)
        with SocketmapClient(endpoint) as client:
            if arguments.key == "-":
                return _print_all(client, name, (to_text(line.rstrip(b"\r\n")) for line in sys.stdin.buffer))
            return _print_one(client, name, os.fsencode(arguments.key))
    except (SettingError, TempFail, LookupTimeout, PermFail, OSError) as error:
        print(f"prefork-socketmap: {arguments.map}: {error}", file=sys.stderr)
        return _exit_code(error)


def _split(text: str) -> tuple[Endpoint, str]:
    """Split at the last colon, as Postfix does."""
    endpoint, colon, name = text.rpartition(":")
    if not colon or not name:
        raise SettingError("", "expected ENDPOINT:MAP, such as inet:127.0.0.1:27823:virtual")
    return Endpoint.parse(endpoint), name


def _print_one(client: SocketmapClient, name: str, key: bytes) -> int:
    value = client.lookup(name, to_text(key))
    if value is None:
        return NOT_FOUND
    _print(to_bytes(value))
    return FOUND


def _print_all(client: SocketmapClient, name: str, keys: Iterable[str]) -> int:
    """Print ``key TAB value`` for each key that is found, like ``postmap -q -``; not found if none is."""
    code = NOT_FOUND
    for key in keys:
        value = client.lookup(name, key)
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
        case SettingError():
            return os.EX_USAGE
        case LookupTimeout():
            return os.EX_UNAVAILABLE
        case PermFail():
            return os.EX_CONFIG
        case _:
            return os.EX_TEMPFAIL
