"""Many clients at once, each with one connection that it never gives up, and a question of its own each time.

They live in one thread with one epoll set, so that there may be thousands of them while the test does something to
the server.
"""

from __future__ import annotations

import heapq
import select
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from types import TracebackType
from typing import Self

from prefork_socketmap.socketmap import netstring
from tests.serving import Client
from tests.threads import Threads
from tests.waiting import eventually

_LAST_ANSWERS = 30.0  # seconds; the slowest machine has answered by then
_PAUSE = 0.1  # how soon the thread sees that it is enough


class Member:
    """One client."""

    def __init__(self, name: str, endpoint: str) -> None:
        self.name = name
        self.due = 0.0
        self.asked_at = 0.0
        self.expected = b""
        self.latencies: list[float] = []
        self.sock = Client(endpoint).sock

    @property
    def answers(self) -> int:
        """How many answers it got."""
        return len(self.latencies)


class Audience(Threads):
    """*number* clients of *endpoints* that ask the map *name*, each every *interval* seconds, or at once again (0).

    The map has to answer each key with that key, which *key* makes of a client's name and the number of its question.
    The clients ask for as long as the context lasts, and then wait for their last answers.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        name: str,
        number: int,
        *,
        interval: float,
        key: Callable[[str, int], str] = "{}-{}".format,
    ) -> None:
        super().__init__([self._run])
        self._interval = interval
        self._map = name
        self._key = key
        self._endpoints = endpoints
        self._number = number
        self.members: list[Member] = []
        self.failures: list[str] = []
        """What no client should see: the end of its connection, a wrong answer, none."""

    @property
    def latencies(self) -> list[float]:
        """What all lookups took, in seconds."""
        return [latency for member in self.members for latency in member.latencies]

    @property
    def answers(self) -> int:
        """How many answers all of them got."""
        return sum(member.answers for member in self.members)

    def await_answers(self, number: int) -> None:
        """Wait until they have got so many more, or for what will show as a failure."""
        goal = self.answers + number
        eventually(lambda: self.answers >= goal or bool(self.failures), _LAST_ANSWERS, f"{number} answers")

    def __enter__(self) -> Self:
        # Connected before anybody asks: what the test then does to the server meets all of them.
        endpoints = self._endpoints
        for number in range(self._number):
            self.members.append(Member(f"{self._map}{number}", endpoints[number % len(endpoints)]))
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for member in self.members:
            member.sock.close()

    def _run(self) -> None:
        self._by_fd = {member.sock.fileno(): member for member in self.members}
        self._queue: list[tuple[float, int]] = []
        with select.epoll() as self._epoll:
            now = monotonic()
            for turn, (fd, member) in enumerate(self._by_fd.items()):
                self._epoll.register(fd, select.EPOLLIN)
                member.due = now + self._interval * turn / len(self._by_fd)
                heapq.heappush(self._queue, (member.due, fd))
            while not self.enough.is_set():
                self._ask_who_is_due()
                self._receive(self._pause())
            self._await_last_answers()

    def _pause(self) -> float:
        return min(max(self._queue[0][0] - monotonic(), 0.0), _PAUSE) if self._queue else _PAUSE

    def _ask_who_is_due(self) -> None:
        now = monotonic()
        while self._queue and self._queue[0][0] <= now:
            _, fd = heapq.heappop(self._queue)
            member = self._by_fd[fd]
            key = self._key(member.name, member.answers)
            member.expected = netstring.encode(f"OK {key}".encode())
            member.asked_at = monotonic()
            try:
                member.sock.send(netstring.encode(f"{self._map} {key}".encode()))
            except OSError as error:
                self._lose(fd, str(error))

    def _receive(self, timeout: float) -> None:
        for fd, _ in self._epoll.poll(timeout):
            member = self._by_fd[fd]
            try:
                answer = member.sock.recv(4096)
            except OSError as error:
                self._lose(fd, str(error))
                continue
            now = monotonic()
            if not answer:
                self._lose(fd, "end of the connection")
            elif answer != member.expected:
                self._lose(fd, f"{answer!r} in place of {member.expected!r}")
            else:
                member.latencies.append(now - member.asked_at)
                member.asked_at = 0.0
                member.due = max(member.due + self._interval, now)
                heapq.heappush(self._queue, (member.due, fd))

    def _lose(self, fd: int, reason: str) -> None:
        self.failures.append(f"{self._by_fd[fd].name}: {reason}")
        self._epoll.unregister(fd)
        del self._by_fd[fd]
        self._queue = [(due, other) for due, other in self._queue if other != fd]
        heapq.heapify(self._queue)

    def _await_last_answers(self) -> None:
        deadline = monotonic() + _LAST_ANSWERS
        while any(self._unanswered()) and monotonic() < deadline:
            self._receive(_PAUSE)
        self.failures += [f"{member.name}: no answer" for member in self._unanswered()]

    def _unanswered(self) -> Iterator[Member]:
        return (member for member in self._by_fd.values() if member.asked_at)
