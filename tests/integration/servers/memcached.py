"""A private memcached, on a port and on a Unix socket."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.servers.process import Server, answers_at, library, program, running


class Memcached(Server):
    """On a port. It keeps nothing over a restart, so ``start`` puts back what was ``set``."""

    def __init__(self) -> None:
        super().__init__()
        self._base = library("pymemcache.client.base", "memcache")
        self._values: dict[str, str] = {}

    def command(self) -> list[str]:
        user = ["-u", "root"]
        return [program("memcached", "memcached"), "-l", "127.0.0.1", "-p", str(self.port), *user]

    def is_ready(self) -> bool:
        if not answers_at(self.port):
            return False
        self._set(self._values)
        return True

    def set(self, values: dict[str, str]) -> None:
        """Have *values* and no others."""
        self._values = values
        with contextlib.closing(self._client()) as client:
            client.flush_all(noreply=False)
        self._set(values)

    def _set(self, values: dict[str, str]) -> None:
        with contextlib.closing(self._client()) as client:
            for key, value in values.items():
                assert client.set(key, value.encode(), noreply=False)

    def _client(self) -> Any:
        return self._base.Client(("127.0.0.1", self.port), timeout=10, connect_timeout=10, allow_unicode_keys=True)


class MemcachedSocket(Server):
    """On a Unix socket, where memcached opens no port."""

    def __init__(self) -> None:
        super().__init__()
        self.socket = self.directory / "socket"

    def command(self) -> list[str]:
        return [program("memcached", "memcached"), "-s", str(self.socket), "-u", "root"]

    def is_ready(self) -> bool:
        return self.socket.exists()


@pytest.fixture(scope="session")
def _memcached() -> Iterator[Memcached]:
    with running(Memcached()) as server:
        yield server


@pytest.fixture
def memcached(_memcached: Memcached) -> Iterator[Memcached]:
    """An empty memcached that runs."""
    _memcached.set({})
    yield _memcached
    _memcached.restore()


@pytest.fixture
def memcached_socket() -> Iterator[MemcachedSocket]:
    """An empty memcached on a Unix socket."""
    with running(MemcachedSocket()) as server:
        yield server
