"""A private HTTP server."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.integration.servers import http_program
from tests.integration.servers.process import Certificate, Server, answers_at, free_port, running


class Httpd(Server):
    """The server's process. What it answers to is told in ``http_program``."""

    def __init__(self) -> None:
        super().__init__()
        self.tls = Certificate(self.directory, self.user)
        self.tls_port = free_port()

    def command(self) -> list[str]:
        arguments = [self.port, self.tls_port, self.tls.certificate, self.tls.key]
        return [sys.executable, http_program.__file__, *map(str, arguments)]

    def is_ready(self) -> bool:
        return answers_at(self.port) and answers_at(self.tls_port)


@pytest.fixture(scope="session")
def _httpd() -> Iterator[Httpd]:
    with running(Httpd()) as server:
        yield server


@pytest.fixture
def httpd(_httpd: Httpd) -> Iterator[Httpd]:
    """An HTTP server that runs."""
    yield _httpd
    _httpd.restore()
