"""The load: clients that ask and check each answer, in processes of their own, and how long they waited.

Postfix's habits: one request at a time on each connection, and a new connection when the server hangs up. Every
connection has a key of its own, so that an answer that went to the wrong client is noticed.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import select
import socket
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from time import perf_counter_ns
from types import TracebackType

from prefork_socketmap.socketmap import netstring
from prefork_socketmap.socketmap.messages import Reply, Request
from tests.bench.servers.table import ENTRIES, MAP

Question = tuple[bytes, bytes]
"""What is asked, and the answer that is expected, as they are sent."""


def socketmap_question(name: str, key: str, value: str) -> Question:
    """Return the question for *key* in the map *name*, where *value* is found."""
    return netstring.encode(Request(name, key).encode()), netstring.encode(Reply.ok(value).encode())


_SECOND = 1_000_000_000
# How long the last answers are waited for when the run has ended.
_LAST_ANSWERS = 5 * _SECOND


@dataclass(frozen=True)
class Load:
    """How many connections ask, and how often each: every *interval* seconds, or as fast as it can (0); in *name*."""

    connections: int
    interval: float = 0.0
    name: str = MAP
    """The map in which ENTRIES are asked for."""
    questions: Sequence[Question] = field(default=(), repr=False)
    """What is asked in their place."""

    def __str__(self) -> str:
        pace = f"one lookup each {self.interval:g} s" if self.interval else "busy"
        return f"{self.connections} connections, {pace}" + (f", in {self.name}" if self.name != MAP else "")


@dataclass
class Outcome:
    """What the clients saw. Latencies are in ns, from the request's ``send`` to the reply's ``recv``."""

    latencies: array[int] = field(default_factory=lambda: array("Q"))
    per_connection: list[int] = field(default_factory=list)
    """Answers that each connection got."""
    wrong: int = 0
    """Answers that were not the one expected."""
    late: int = 0
    """Questions without an answer when the next one was due, or at the end."""
    hangups: int = 0
    """Connections that the server ended; the client connected anew and asked again."""
    elapsed: float = 0.0
    """Seconds."""

    def add(self, other: Outcome) -> None:
        """Add what the clients of another process saw at the same time."""
        self.latencies += other.latencies
        self.per_connection += other.per_connection
        self.wrong += other.wrong
        self.late += other.late
        self.hangups += other.hangups
        self.elapsed = max(self.elapsed, other.elapsed)


class Client:
    """One connection with its one question."""

    __slots__ = ("answers", "asked_at", "expected", "question", "sock")

    def __init__(self, question: Question) -> None:
        self.question, self.expected = question
        self.asked_at = 0  # 0: nothing is asked
        self.answers = 0
        self.sock: socket.socket


class Loader:
    """The clients of one process, in one epoll set."""

    def __init__(self, port: int, load: Load, numbers: range) -> None:
        self._port = port
        self._load = load
        self._epoll = select.epoll()
        self._by_fd: dict[int, Client] = {}
        self._outcome = Outcome()
        questions = load.questions or [socketmap_question(load.name, *entry) for entry in ENTRIES.items()]
        self._clients = [Client(questions[number % len(questions)]) for number in numbers]
        for client in self._clients:
            self._connect(client)

    def _connect(self, client: Client) -> None:
        client.sock = socket.create_connection(("127.0.0.1", self._port))
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._by_fd[client.sock.fileno()] = client
        self._epoll.register(client.sock, select.EPOLLIN)

    def run(self, seconds: float) -> Outcome:
        """Ask for so long, wait for the last answers, and return what was seen."""
        begin = perf_counter_ns()
        end = begin + int(seconds * _SECOND)
        if self._load.interval:
            self._ask_on_time(begin, end)
        else:
            self._ask_at_once(end)
        self._outcome.elapsed = (perf_counter_ns() - begin) / _SECOND
        self._await_last_answers()
        self._outcome.per_connection = [client.answers for client in self._clients]
        return self._outcome

    def close(self) -> None:
        """Hang up."""
        self._epoll.close()
        for client in self._clients:
            client.sock.close()

    def _ask_at_once(self, end: int) -> None:
        """Ask again as soon as there is an answer."""
        for client in self._clients:
            self._ask(client, perf_counter_ns())
        while (now := perf_counter_ns()) < end:
            for client in self._readable(end - now):
                received_at = self._receive(client)
                if not client.asked_at:  # else the server hung up, and the question has been repeated already
                    self._ask(client, received_at)

    def _ask_on_time(self, begin: int, end: int) -> None:
        """Ask at each client's times, which are spread evenly over the interval."""
        step = self._load.interval * _SECOND / len(self._clients)
        for turn, client in enumerate(itertools.cycle(self._clients)):
            due = begin + int(turn * step)
            if due >= end:
                return
            while (now := perf_counter_ns()) < due:
                for answered in self._readable(due - now):
                    self._receive(answered)
            if client.asked_at:
                self._outcome.late += 1
            else:
                self._ask(client, now)

    def _await_last_answers(self) -> None:
        deadline = perf_counter_ns() + _LAST_ANSWERS
        while any(client.asked_at for client in self._clients) and (now := perf_counter_ns()) < deadline:
            for client in self._readable(deadline - now):
                self._receive(client)
        self._outcome.late += sum(1 for client in self._clients if client.asked_at)

    def _readable(self, patience: int) -> Iterator[Client]:
        return (self._by_fd[fd] for fd, _ in self._epoll.poll(patience / _SECOND))

    def _ask(self, client: Client, now: int) -> None:
        client.asked_at = now
        # A reset shows at the next recv as well, and is dealt with there.
        with contextlib.suppress(ConnectionError):
            client.sock.send(client.question)

    def _receive(self, client: Client) -> int:
        """Take the answer, and return the time."""
        try:
            answer = client.sock.recv(4096)
        except ConnectionError:
            answer = b""
        now = perf_counter_ns()
        if not answer:
            self._reconnect(client)
            return now
        self._outcome.wrong += answer != client.expected
        self._outcome.latencies.append(now - client.asked_at)
        client.answers += 1
        client.asked_at = 0
        return now

    def _reconnect(self, client: Client) -> None:
        """Connect anew after the server hung up, and repeat what was asked: the time it was first asked counts."""
        self._outcome.hangups += 1
        del self._by_fd[client.sock.fileno()]
        client.sock.close()
        self._connect(client)
        if client.asked_at:
            self._ask(client, client.asked_at)


class Loaders:
    """Loaders in processes of their own, connected when the block is entered and hung up when it is left."""

    def __init__(self, port: int, load: Load, processes: int) -> None:
        share = -(-load.connections // min(processes, load.connections))
        everyone = range(load.connections)
        parts = [everyone[first : first + share] for first in everyone[::share]]
        fork = multiprocessing.get_context("fork")
        self._pipes: list[Connection] = []
        self._processes = []
        for part in parts:
            ours, theirs = fork.Pipe()
            self._pipes.append(ours)
            self._processes.append(fork.Process(target=_load, args=(theirs, port, load, part), daemon=True))

    def __enter__(self) -> Loaders:
        for process in self._processes:
            process.start()
        for pipe in self._pipes:
            pipe.recv()
        return self

    def begin(self, seconds: float) -> None:
        """Begin to load the server, for so long."""
        for pipe in self._pipes:
            pipe.send(seconds)

    def run(self, seconds: float) -> Outcome:
        """Load the server for so long. The connections stay open."""
        self.begin(seconds)
        outcome = Outcome()
        for pipe in self._pipes:
            outcome.add(pipe.recv())
        return outcome

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()


def _load(pipe: Connection, port: int, load: Load, numbers: range) -> None:
    """The life of a load process: connect, wait for the word, ask, report, and keep the connections until killed."""
    gc.disable()
    loader = Loader(port, load, numbers)
    pipe.send("connected")
    pipe.send(loader.run(pipe.recv()))
    with contextlib.suppress(EOFError):
        pipe.recv()
