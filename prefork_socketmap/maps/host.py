"""Where a server of a network map is: a host and port, or a Unix socket, in the forms of mysql_table(5), "hosts"."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from prefork_socketmap import settings

_NETWORK = re.compile(r"(?:inet:)?(?:\[(?P<literal>[^\]]+)\]|(?P<name>[^:/\[\]@\s]+))(?::(?P<port>\d+))?")
_UNIX = "unix:"
_ACCEPTED_NETWORK = '"host", "host:port", "[IPv6 address]:port" or "inet:host:port"'
_ACCEPTED = f'{_ACCEPTED_NETWORK}, or "unix:/path"'


class Host(NamedTuple):
    """Either ``name`` and ``port``, or ``path``."""

    name: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, text: str, default_port: int = 0) -> Host:
        """Read *text*. Raises ValueError."""
        if text.startswith(_UNIX + "/"):
            return cls("", 0, text.removeprefix(_UNIX))
        match = _NETWORK.fullmatch(text)
        if match is None or int(match["port"] or 1) not in range(1, 65536):
            raise ValueError(text)
        return cls(match["literal"] or match["name"], int(match["port"] or default_port))


def host(key: str, value: str) -> None:
    """Raise SettingError if ``Host.parse`` does not take *value*."""
    try:
        Host.parse(value)
    except ValueError:
        raise settings.wrong(key, value, _ACCEPTED) from None


def network_host(key: str, value: str) -> None:
    """Raise SettingError if *value* is no host, or a Unix socket."""
    host(key, value)
    if value.startswith(_UNIX):
        raise settings.wrong(key, value, _ACCEPTED_NETWORK)


def hosts(key: str, value: object, check: Callable[[str, str], None] = host) -> tuple[str, ...]:
    """Read a setting: a list of one host or more, each passed through *check*."""
    names = settings.texts(key, value)
    if not names:
        raise settings.wrong(key, value, "a list of at least one host")
    for name in names:
        check(key, name)
    return names
