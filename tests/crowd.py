"""Thousands of clients at once, and what a server's shared memory says of them."""

from __future__ import annotations

import contextlib
import logging
import resource
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from prefork_socketmap import Endpoint
from prefork_socketmap.prefork.counters import server_counter
from prefork_socketmap.prefork.scoreboard import State
from tests.serving import Client, Site, scoreboard

MANY = 2000
GOOD_DEADLINE = 5.0
"""What a good client waits for, beside any bad ones, happens long before so many seconds."""


@pytest.fixture
def room_for_many() -> Iterator[None]:
    """Let this process have as many files open as the system admits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Crowd:
    """Connections that do as little for the test as they can: bare sockets, which never block."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = Endpoint.parse(endpoint)
        self.sockets: list[socket.socket] = []

    def join(self, number: int, words: bytes = b"", *, receive_buffer: int = 0) -> None:
        """Let *number* more connect, and say *words*."""
        for _ in range(number):
            sock = _connect(self._endpoint, receive_buffer)
            self.sockets.append(sock)
            if words:
                sock.send(words)

    def say(self, words: bytes) -> None:
        """Let each that is still connected say *words*, as far as there is room for them."""
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.send(words)

    def heard(self) -> int:
        """Return how many have something to read, or an end."""
        with selectors.DefaultSelector() as selector:
            for sock in self.sockets:
                selector.register(sock, selectors.EVENT_READ)
            return len(selector.select(0))

    def close(self) -> None:
        """Hang up all of them."""
        for sock in self.sockets:
            sock.close()
        self.sockets.clear()

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def _connect(endpoint: Endpoint, receive_buffer: int) -> socket.socket:
    if endpoint.kind == "unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    else:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect(endpoint.path if endpoint.kind == "unix" else (endpoint.host, endpoint.port))
    sock.setblocking(False)
    return sock


class GoodClient:
    """A client that asks one thing after the other, each time with another key, and does not wait for long."""

    def __init__(self, site: Site, endpoint: str = "") -> None:
        self._connect = partial(site.connect, endpoint)
        self._asked = 0
        self._client = self._known()

    def _known(self) -> Client:
        client = self._connect()
        client.sock.settimeout(GOOD_DEADLINE)
        return client

    def ask(self) -> None:
        """Be answered."""
        self._asked += 1
        assert self._client.ask(b"echo good%d" % self._asked) == b"OK good%d" % self._asked

    def ask_anew(self) -> None:
        """Be answered over a connection of its own."""
        with self._known() as client:
            assert client.ask(b"echo new") == b"OK new"

    def ask_for(self, seconds: float) -> int:
        """Be answered, again and again, for so long; return how often."""
        deadline = time.monotonic() + seconds
        before = self._asked
        while time.monotonic() < deadline:
            self.ask()
        return self._asked - before


def echo(key: str) -> str:
    """Answer with the key."""
    return key


class Board:
    """The scoreboard of a running server, read from outside."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def counter(self, group: str, name: str) -> int:
        """Return what one of SERVER_COUNTERS has come to."""
        board = scoreboard(self._pid)
        return board.server_counters()[server_counter(group, name)]

    def states(self) -> dict[int, State]:
        """Return the state of each worker, by its pid."""
        return {row.pid: row.state for row in scoreboard(self._pid).rows() if row.pid}

    def generations(self) -> set[int]:
        """Return the generations of all workers."""
        return {row.generation for row in scoreboard(self._pid).rows() if row.pid}

    def has_an_idle_worker(self) -> bool:
        """Whether somebody on duty has nothing to do: nobody waits to be served."""
        return State.IDLE in self.states().values()

    def on_duty(self) -> list[int]:
        """Return the pids of those that are on duty."""
        return [pid for pid, state in self.states().items() if state in (State.IDLE, State.SERVING)]

    @property
    def connections(self) -> int:
        """How many connections are in the table."""
        return scoreboard(self._pid).connections


class Log:
    """What a server's processes log, as lines with the level and the text."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self, text: str) -> list[str]:
        """Return the lines with *text*."""
        return [line for line in self._path.read_text().splitlines() if text in line]

    def has(self, text: str) -> Callable[[], bool]:
        """Return a check whether there is a line with *text*."""
        return lambda: bool(self.lines(text))


@pytest.fixture
def server_log(tmp_path: Path) -> Iterator[Log]:
    """The log of servers that are started afterwards."""
    path = tmp_path / "server.log"
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("prefork_socketmap")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield Log(path)
    logger.removeHandler(handler)
    logger.setLevel(level)
    handler.close()


def switches(pid: int) -> int:
    """Return how often a process has gone to sleep by itself."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches"):
            return int(line.split()[1])
    raise AssertionError(f"process {pid} has no status")
