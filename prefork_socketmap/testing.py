"""For the tests of a program that serves with this library: its server on a free port, and a client that asks it.

``serving`` is for any test, ``serve_socketmap`` a fixture for pytest. Neither needs the program to listen anywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from prefork_socketmap import usage
from prefork_socketmap.client import SocketmapClient
from prefork_socketmap.prefork.listener import Endpoint
from prefork_socketmap.server import Server

TIMEOUT = 30.0
"""How many seconds a client of a test waits for an answer; those of Postfix wait 100."""


@contextlib.contextmanager
def serving(server: Server) -> Iterator[SocketmapClient]:
    """Serve *server* on a free port of 127.0.0.1, and not where it listens otherwise; give a client that asks it.

    It is stopped in the end. Raises what ``Server.start`` raises.
    """
    if not isinstance(server, Server):
        usage.wrong_type("server", server, "a Server")
    with server._start_on(Endpoint("inet", "127.0.0.1", 0)) as running:
        (endpoint,) = running.endpoints
        with SocketmapClient(endpoint, timeout=TIMEOUT) as client:
            yield client


@pytest.fixture
def serve_socketmap() -> Iterator[Callable[[Server], SocketmapClient]]:
    """``serve_socketmap(server)`` serves a server until the test is over, and returns a client; see ``serving``."""
    with contextlib.ExitStack() as stack:
        yield lambda server: stack.enter_context(serving(server))
