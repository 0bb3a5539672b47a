"""A port that drops packets, as a firewall or a machine that is gone does."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.integration.servers.process import free_port


@pytest.fixture
def dropping_port() -> Iterator[int]:
    """A TCP port of 127.0.0.1 where connection attempts are neither accepted nor refused."""
    clients = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
        listener.listen(0)
        port: int = listener.getsockname()[1]
        # The kernel drops what comes when the queue is full; nobody ever takes anything from it.
        try:
            while True:
                clients.append(socket.create_connection(("127.0.0.1", port), timeout=0.5))
        except TimeoutError:
            yield port
        finally:
            for client in clients:
                client.close()
