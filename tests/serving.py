"""Servers, clients and processes for the tests that look at a server from outside, over real sockets."""

from __future__ import annotations

import contextlib
import enum
import multiprocessing
import os
import select
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import TracebackType

import pytest

from prefork_socketmap import Config, Endpoint, RunningServer, Server
from prefork_socketmap.prefork.counters import server_counter
from prefork_socketmap.prefork.scoreboard import Row, Scoreboard, State
from prefork_socketmap.service import DefaultLookup, Lookup
from prefork_socketmap.socketmap import netstring
from tests.integration.servers.process import free_port
from tests.processes import children, memories, process_title
from tests.waiting import eventually

DEADLINE = 20.0
"""What a test waits for happens long before so many seconds."""

_forking = multiprocessing.get_context("fork")


def say_ok(key: str) -> str:
    """Answer any key."""
    return "ok"


def who(key: str) -> str:
    """Answer with the pid of the worker."""
    return str(os.getpid())


MAPS = {"ok": say_ok, "who": who}


class End(enum.Enum):
    """How a connection ended, as the client saw it."""

    ORDERLY = "end of file"
    RESET = "connection reset"


class Client:
    """A raw connection to a server, which sends what it is told and interprets nothing."""

    def __init__(self, endpoint: str, *, receive_buffer: int = 0) -> None:
        """Connect. *receive_buffer*, in bytes, makes the client one that takes little at a time."""
        where = Endpoint.parse(endpoint)
        self.sock = socket.socket(_family(where), socket.SOCK_STREAM)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if where.kind == "inet":
            # What is sent in pieces shall arrive in pieces.
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.settimeout(DEADLINE)
        self.sock.connect(where.path if where.kind == "unix" else (where.host, where.port))
        self._decoder = netstring.Decoder(10_000_000)

    def send(self, data: bytes) -> None:
        """Send *data* as it is."""
        self.sock.sendall(data)

    def request(self, payload: bytes) -> None:
        """Send a request, and do not wait for the reply."""
        self.send(netstring.encode(payload))

    def reply(self) -> bytes:
        """Return the payload of the next reply."""
        while (payload := self._decoder.next()) is None:
            data = self.sock.recv(65536)
            assert data, "the connection ended before the reply"
            self._decoder.feed(data)
        return payload

    def ask(self, payload: bytes) -> bytes:
        """Return the reply to a request."""
        self.request(payload)
        return self.reply()

    def end(self) -> End:
        """Wait until the server ends the connection; return how. Nothing may arrive before."""
        assert not self._decoder.pending
        try:
            data = self.sock.recv(65536)
        except ConnectionResetError:
            return End.RESET
        assert data == b""
        return End.ORDERLY

    @property
    def is_open(self) -> bool:
        """Whether the server has neither ended the connection nor sent anything that was not asked for."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _family(endpoint: Endpoint) -> socket.AddressFamily:
    if endpoint.kind == "unix":
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET


class Gate:
    """Holds lookups up, in whichever process they run, until the test opens it."""

    def __init__(self) -> None:
        self._arrived = _forking.Semaphore(0)
        self._opened = _forking.Semaphore(0)

    def lookup(self, key: str) -> str:
        """Be the lookup: tell that it has begun, wait until it may go on, and answer."""
        self.arrive()
        self._opened.acquire()
        return "done"

    def arrive(self) -> None:
        """Tell the test that this point has been reached."""
        self._arrived.release()

    def await_arrival(self) -> None:
        """Wait until a lookup stands at the gate."""
        assert self._arrived.acquire(timeout=DEADLINE), "nobody has reached the gate"

    def open(self) -> None:
        """Let one lookup go on."""
        self._opened.release()

    def gather(self, clients: Sequence[Client]) -> None:
        """Have all *clients* served at the same time, by the map ``slow``, whose lookup is this gate's."""
        for client in clients:
            client.request(b"slow key")
        for _ in clients:
            self.await_arrival()
        for _ in clients:
            self.open()
        assert [client.reply() for client in clients] == [b"OK done"] * len(clients)


@pytest.fixture
def gate() -> Gate:
    return Gate()


class Site:
    """A server that was started in the background, with its clients and its processes."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.running: RunningServer = server.start()
        self.pid = self.running.pid
        self._clients: list[Client] = []

    @property
    def endpoint(self) -> str:
        """The first endpoint."""
        return self.running.endpoints[0]

    def connect(self, endpoint: str = "", *, receive_buffer: int = 0) -> Client:
        """Connect a client, which is closed with the site at the latest."""
        client = Client(endpoint or self.endpoint, receive_buffer=receive_buffer)
        self._clients.append(client)
        return client

    @property
    def workers(self) -> list[int]:
        """The process ids of the workers, ready or not."""
        return children(self.pid)

    def await_workers(self, number: int) -> list[int]:
        """Wait until so many workers are there and ready; return their process ids."""

        def so_many() -> list[int]:
            found = self.workers
            doing = [process_title(pid) for pid in found]
            assert len(found) == number, f"{number} workers were expected, there are: {doing}"
            assert not any("starting" in one or "worker" not in one for one in doing), doing
            return found

        return eventually(so_many, DEADLINE)

    def rows(self) -> list[Row]:
        """Return the rows of the scoreboard that workers have."""
        return rows_of(self.pid)

    def await_idle(self) -> None:
        """Wait until no worker has a client in hand."""
        eventually(lambda: all(is_free(row) for row in self.rows()), DEADLINE, "idle workers")

    def counted(self, group: str, name: str) -> int:
        """Return one of the server's counters."""
        return scoreboard(self.pid).server_counters()[server_counter(group, name)]

    def await_count(self, group: str, name: str, number: int) -> None:
        """Wait until one of the server's counters says so; it may be late, not wrong."""
        eventually(lambda: self.counted(group, name) >= number, DEADLINE, f"{number} {group} {name}")
        assert self.counted(group, name) == number

    def close(self) -> None:
        """Hang up all clients, and stop the server."""
        for client in self._clients:
            client.close()
        self.server.close()


Serve = Callable[..., Site]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory for sockets: its path is short, since the kernel allows a socket's path about 100 bytes."""
    path = Path(tempfile.mkdtemp(prefix="socketmap-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["inet", "unix"])
def endpoint(request: pytest.FixtureRequest, directory: Path) -> str:
    """Where to listen; a test that uses this runs over TCP and over a Unix socket."""
    return f"unix:{directory}/socket" if request.param == "unix" else f"inet:127.0.0.1:{free_port()}"


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers: ``serve(maps, Config(...), endpoint)``; they are stopped in the end."""
    with contextlib.ExitStack() as stack:

        def start(
            maps: Mapping[str, Lookup],
            config: Config | None = None,
            endpoint: str = "",
            default: DefaultLookup | None = None,
            on_worker_start: Callable[[], object] | None = None,
        ) -> Site:
            server = Server(config)
            for name, lookup in maps.items():
                server.register_map(name, lookup)
            if default:
                server.register_default_map(default)
            if on_worker_start:
                server.on_worker_start(on_worker_start)
            server.listen(endpoint or f"inet:127.0.0.1:{free_port()}")
            site = Site(server)
            stack.callback(site.close)
            return site

        yield start


Fork = Callable[[Callable[[], object]], ForkProcess]


@pytest.fixture
def fork() -> Iterator[Fork]:
    """Run functions in processes of their own: a server in the foreground, for one. They are killed in the end."""
    processes: list[ForkProcess] = []

    def run(function: Callable[[], object]) -> ForkProcess:
        process = _forking.Process(target=function)
        process.start()
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.join()


def exit_code(process: ForkProcess) -> int:
    """Wait until a process has ended; return its exit code, negative for the signal that killed it."""
    process.join(DEADLINE)
    assert process.exitcode is not None, "the process has not ended"
    return process.exitcode


def serving(endpoint: str) -> Client:
    """Wait until somebody serves at *endpoint*; return a client that is connected to it."""

    def connect() -> Client:
        try:
            return Client(endpoint)
        except OSError as error:
            raise AssertionError(f"nobody serves at {endpoint}") from error

    return eventually(connect, DEADLINE)


def abrupt(endpoint: str) -> End:
    """Return how a connection ends that the server gives up: by reset, which a Unix socket does not have."""
    return End.RESET if endpoint.startswith("inet:") else End.ORDERLY


def end_of_newcomer(endpoint: str) -> End:
    """Connect to *endpoint*, say nothing, and return how the server ends that."""
    try:
        with Client(endpoint) as client:
            return client.end()
    except ConnectionResetError:  # before connect() has returned
        return End.RESET


# What is in a master's memory.


def scoreboard(pid: int) -> Scoreboard:
    """Return the scoreboard of a master, as it is now: it grows with the number of workers."""
    # It may have inherited others, from a test that has used some of its own.
    return next(board for board in map(Scoreboard.read, memories_of(pid, "scoreboard")) if board.pid == pid)


def kept(pid: int) -> int:
    """Return how many bytes of memory the connections of a master wait with."""
    return memories_of(pid, "buffers")[0].stat().st_blocks * 512


def memories_of(pid: int, name: str) -> list[Path]:
    """Return where a process has its memory with this name, which it must have."""
    found = memories(pid, name)
    assert found, f"process {pid} has no memory with the name {name}"
    return found


def rows_of(pid: int) -> list[Row]:
    """Return the rows that the workers of a master have on its scoreboard."""
    return [row for row in scoreboard(pid).rows() if row.state is not State.FREE]


def is_free(row: Row) -> bool:
    """Whether a worker waits for clients, on duty or in reserve, and has none in hand."""
    return row.state in (State.IDLE, State.RESERVE) and not row.held
