"""The type ``memcache``: a memcached server, in the terms of memcache_table(5), asked and never written.

The driver is pymemcache: in Python alone, so that the watchdog's signal gets through.
"""

# pymemcache has no type hints.
# mypy: disable-error-code="import-untyped, misc"

from __future__ import annotations

import time
from collections.abc import Sequence

from pymemcache import MemcacheError, MemcacheIllegalInputError, MemcacheUnexpectedCloseError
from pymemcache.client.base import Client

from prefork_socketmap.maps import host as host_setting
from prefork_socketmap.maps import template
from prefork_socketmap.maps.base import log
from prefork_socketmap.maps.host import Host
from prefork_socketmap.maps.network import NetworkMap, Trouble
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.maps.template import Address, Template
from prefork_socketmap.socketmap.messages import to_text

_PORT = 11211


class MemcacheMap(NetworkMap[Client]):
    """Answers with the value that stands at the key."""

    hosts = setting(host_setting.hosts)
    """Hosts and Unix sockets, each with all keys. Default port: 11211."""
    key_format = setting(template.template, Template("%s"))
    """The key to get; ``aliases:%s``, for one, where several tables share a server."""

    errors = (MemcacheError, OSError)
    of_the_query = ("key_format",)

    def dial(self, host: str, timeout: float) -> Client:
        """Connect to *host*."""
        begin = time.monotonic()
        address = Host.parse(host, _PORT)
        client = Client(
            address.path or (address.name, address.port),
            connect_timeout=timeout,
            timeout=timeout,
            no_delay=True,
            allow_unicode_keys=True,
        )
        client.version()  # connects
        log.debug("map %s: connected in %.1f ms", self.name, (time.monotonic() - begin) * 1000)
        client.sock.settimeout(self.timeout)
        return client

    def ask(self, connection: Client, key: str) -> Sequence[str] | None:
        """Get the value for *key*."""
        asked = self.key_format.expand(Address.split(key))
        log.debug("map %s: get %r", self.name, asked)
        try:
            value = connection.get(asked)
        except MemcacheIllegalInputError:
            return None  # a blank in it, or longer than 250 bytes: no server has it
        except TimeoutError as error:
            raise _NoAnswerError(str(error)) from error
        return None if value is None else (to_text(value),)

    def hang_up(self, connection: Client) -> None:
        """Close the connection."""
        connection.close()

    def trouble(self, connection: Client, error: Exception) -> Trouble:  # noqa: ARG002
        """pymemcache has a class for each, and closes the connection after all of them."""
        if isinstance(error, _NoAnswerError):
            return Trouble.SLOW
        return Trouble.LOST if isinstance(error, OSError | MemcacheUnexpectedCloseError) else Trouble.REFUSED


class _NoAnswerError(MemcacheError):
    """The server has not answered in time."""
