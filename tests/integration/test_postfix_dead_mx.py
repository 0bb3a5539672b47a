"""Postfix's smtp(8) between two lookups with a connect timeout in between: how the server's close has to look.

A connect that times out leaves ETIMEDOUT in smtp(8)'s errno. If the server has closed the TCP connection in an
orderly way meanwhile, the next lookup writes its request, reads the end of the stream, takes the old errno for a
timeout of this read, and is not repeated: the mail is deferred. A reset overwrites errno. The tests at the end show
that the kind of close is what makes the difference.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from prefork_socketmap import Config, Server
from prefork_socketmap.prefork import connection, connections
from tests.integration.postfix import Postfix
from tests.integration.servers.process import answers_at, free_port, program
from tests.waiting import eventually

CLOSED_WHEN_SILENT = Config(keepalive_timeout=0.5)
KEPT = Config()


class Lookup(NamedTuple):
    """A lookup that the server has answered."""

    worker: int
    key: str


class PolicyServer:
    """A server with the map ``policy``, which wants no TLS anywhere and remembers who was asked for what."""

    def __init__(self, config: Config, directory: Path) -> None:
        self._record = directory / "asked"
        self._record.touch()
        server = Server(config)
        server.register_map("policy", self._policy)
        server.listen(f"inet:127.0.0.1:{free_port()}")
        self.running = server.start()

    def _policy(self, key: str) -> str:
        with self._record.open("a") as record:
            record.write(f"{os.getpid()} {key}\n")
        return "none"

    @property
    def table(self) -> str:
        return f"socketmap:{self.running.endpoints[0]}:policy"

    def lookups(self) -> list[Lookup]:
        words = (line.split() for line in self._record.read_text().splitlines())
        return [Lookup(int(pid), key) for pid, key in words]


@pytest.fixture(scope="module")
def dead_port() -> Iterator[int]:
    """A port where a connect gets no answer: the accept queue is full, and nobody accepts."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", free_port()))
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        with pytest.raises(TimeoutError):
            socket.create_connection(listener.getsockname(), timeout=0.2)
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def sink_port() -> Iterator[int]:
    """The port of an SMTP server that takes all mail."""
    port = free_port()
    command = [program("smtp-sink", "postfix"), "-u", "postfix", f"127.0.0.1:{port}", "10"]
    with subprocess.Popen(command) as sink:
        try:
            eventually(lambda: answers_at(port), what="smtp-sink answers")
            yield port
        finally:
            sink.terminate()


class Relay(NamedTuple):
    """A Postfix that relays by way of a host that does not answer, and the server that it asks about each host."""

    postfix: Postfix
    server: PolicyServer

    def send(self) -> None:
        """Send a mail, which is relayed in the background."""
        with self.postfix.transaction() as session:
            session.deliver("user@elsewhere.test")

    def kill_the_worker_after_the_first_lookup(self) -> None:
        first = eventually(self.server.lookups)
        os.kill(first[0].worker, signal.SIGKILL)
        assert len(self.server.lookups()) == 1

    def assert_both_lookups_are_answered(self) -> None:
        self.postfix.logged("to=<user@elsewhere.test>", "status=sent")
        assert len(self.server.lookups()) == 2
        assert "lookup error" not in self.postfix.log()

    def assert_the_second_lookup_fails(self) -> None:
        self.postfix.logged("lookup error: unexpected disconnect")
        self.postfix.logged("to=<user@elsewhere.test>", "status=deferred")
        assert len(self.server.lookups()) == 1


StartRelay = Callable[[Config], Relay]


@pytest.fixture
def start_relay(dead_port: int, sink_port: int, tmp_path: Path) -> Iterator[StartRelay]:
    """Start the server with a Config, and a Postfix that waits 3 s for the dead host: more than keepalive_timeout."""
    with contextlib.ExitStack() as stack:

        def start(config: Config) -> Relay:
            server = PolicyServer(config, tmp_path)
            stack.enter_context(server.running)
            parameters = {
                "mynetworks": "127.0.0.0/8",
                "relayhost": f"[127.0.0.1]:{dead_port}",
                "smtp_fallback_relay": f"[127.0.0.1]:{sink_port}",
                "smtp_connect_timeout": "3s",
                "smtp_tls_policy_maps": server.table,
            }
            postfix = stack.enter_context(Postfix(parameters))
            postfix.start()
            return Relay(postfix, server)

        yield start


@pytest.fixture
def orderly_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server's connections end as any other program's do."""

    def close(fd: int, _family: int) -> None:
        with socket.socket(fileno=os.dup(fd)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, connection._ORDERLY_CLOSE)
            sock.shutdown(socket.SHUT_RDWR)

    monkeypatch.setattr(connections, "reset", close)


@pytest.mark.parametrize("config", [CLOSED_WHEN_SILENT, KEPT], ids=["closed", "kept"])
def test_a_silent_connection_costs_postfix_nothing(start_relay: StartRelay, config: Config) -> None:
    relay = start_relay(config)

    relay.send()

    relay.assert_both_lookups_are_answered()


def test_a_worker_that_is_killed_between_two_lookups_costs_postfix_nothing(start_relay: StartRelay) -> None:
    relay = start_relay(KEPT)

    relay.send()
    relay.kill_the_worker_after_the_first_lookup()

    relay.assert_both_lookups_are_answered()


@pytest.mark.usefixtures("orderly_close")
def test_an_orderly_close_of_a_silent_connection_would_defer_the_mail(start_relay: StartRelay) -> None:
    relay = start_relay(CLOSED_WHEN_SILENT)

    relay.send()

    relay.assert_the_second_lookup_fails()
