"""The lot: where connections stand while their clients are silent, and where workers wait for work.

A worker that owned a connection for as long as the client keeps it open would be idle for most of its life: Postfix
processes keep theirs for a hundred seconds without a word. One that watched many connections of its own would let
them all wait behind one slow lookup. So no worker owns a silent connection. All of them stand in one epoll set that
the master makes before it forks and that all processes share, each armed for exactly one event (EPOLLONESHOT): when
a client speaks, the kernel hands its connection to one idle worker, and to nobody else until that worker puts it
back. A stuck worker holds up one client; which workers come and go is nothing that a client can see.

An entry of an epoll set is a pair of an open file and a *number*, the descriptor's (epoll(7), Q0). So the processes
must use the same number for a connection: the master chooses one, in a range where workers have nothing else, and a
worker that meets a connection for the first time, unless it inherited it, fetches a duplicate from the master, puts
it at that number and keeps it for the next time. A number that is used again gets a new *serial* in the shared
table, which tells workers that their duplicate is of a connection that is gone.

``Lot`` is what all processes share, ``Keeper`` is the master's part.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import selectors
import socket
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Self

from prefork_socketmap.prefork import memory
from prefork_socketmap.prefork.abort import abort
from prefork_socketmap.prefork.scoreboard import Row, Scoreboard
from prefork_socketmap.prefork.takeover import LotState, TakeoverError

# The master's and the workers' other descriptors are below; a quarter of a small limit has to do for them.
_FIRST_NUMBER = 1024
_NOBODY = 0
_CELLS, _CELL = 3, 8  # columns of the table, bytes in a cell


Inheritance = dict[int, tuple[int, socket.socket]]
"""Connections by number, each with its serial."""


class Lot:
    """The shared epoll set and the table beside it. Made by the master before it forks.

    *limit*: the most descriptors that a process may have. Each cell of the table has one writer at a time: whoever
    holds the connection, and the master while nobody does.
    """

    def __init__(self, limit: int, *, parking: bool | None = None) -> None:
        """*parking*: whether connections can stand here; by default where there is epoll."""
        self.can_park = hasattr(select, "epoll") if parking is None else parking
        self._set: _SharedSet | _OwnSet = _SharedSet.new() if self.can_park else _OwnSet()
        self._reserve = _Bell.new() if self.can_park else None
        self.first_number = min(_FIRST_NUMBER, limit // 4)
        self._map_table(memory.create("lot", _CELLS * _CELL * (min(limit, 1 << 20) - self.first_number)))

    def _map_table(self, fd: int) -> None:
        self._table = fd
        view = memory.view(fd)
        column = len(view) // _CELLS
        self.size = column // _CELL
        self._serials = view[:column].cast("Q")
        self._holders = view[column : 2 * column].cast("Q")
        self._since = view[2 * column :].cast("d")

    def state(self) -> LotState:
        """Return what another program needs to go on with this lot. Raises TakeoverError where that is impossible."""
        if not self._reserve or isinstance(self._set, _OwnSet):
            raise TakeoverError("without epoll the program cannot be replaced: stop and start it")
        return LotState(
            self.first_number, self._set.fileno(), self._reserve.fileno(), self._reserve.clapper, self._table
        )

    @classmethod
    def resume(cls, state: LotState) -> Self:
        """Go on with the lot of the program that was here before."""
        lot = cls.__new__(cls)
        lot.can_park = True
        lot.first_number = state.first_number
        lot._set = _SharedSet(select.epoll.fromfd(state.set))
        lot._reserve = _Bell(select.epoll.fromfd(state.bell), state.clapper)
        lot._map_table(state.table)
        return lot

    def is_connection(self, number: int) -> bool:
        """Whether *number* belongs to a connection; otherwise it is that of a listener, or of the lifeline."""
        return number >= self.first_number

    def wait(self, timeout: float = -1) -> int | None:
        """Wait for something to do; return its number, which is now disarmed. None: nothing within *timeout* s."""
        return self._set.wait(timeout)

    @property
    def has_reserve(self) -> bool:
        """Whether idle workers can wait apart, until they are called."""
        return self._reserve is not None

    def wait_in_reserve(self) -> None:
        """Wait to be called to the front, by somebody's ``call_reserve`` or by the end of the master."""
        if self._reserve:
            self._reserve.wait()

    def call_reserve(self) -> None:
        """Call one of the workers in reserve to the front; if there is none, the next that would wait there."""
        if self._reserve:
            self._reserve.ring()

    def watch_master(self, lifeline: int) -> None:
        """Wake everybody, for good, when *lifeline* becomes readable: it ends with the master."""
        self._set.add(lifeline, always=True)
        if self._reserve:
            self._reserve.add(lifeline, always=True)

    def enter(self, numbers: Iterable[int]) -> None:
        """In a new worker: wait for *numbers* and nothing else, where each process waits for itself."""
        if isinstance(self._set, _OwnSet):
            self._set.restrict_to(numbers)

    def put_back(self, number: int) -> None:
        """Arm *number* again. Raises FileNotFoundError when it is no longer in the set."""
        self._set.arm(number)

    def hold(self, number: int, row: Row) -> int:
        """Note that the worker of *row* serves the connection; return its serial."""
        index = number - self.first_number
        self._holders[index] = row.slot + 1
        return self._serials[index]

    def release(self, number: int) -> None:
        """Note that nobody serves the connection, from now on, and arm it."""
        index = number - self.first_number
        self._since[index] = monotonic()
        self._holders[index] = _NOBODY
        self._set.arm(number)

    def serial(self, number: int) -> int:
        """Return the serial of the connection that has *number* now."""
        return self._serials[number - self.first_number]

    def new_serial(self, number: int) -> None:
        """Begin the life of a new connection at *number*."""
        index = number - self.first_number
        self._serials[index] += 1
        self._holders[index] = _NOBODY
        self._since[index] = monotonic()

    def holder(self, number: int) -> int | None:
        """Return the slot of the worker that serves the connection, None when it is silent."""
        holder = self._holders[number - self.first_number]
        return None if holder == _NOBODY else holder - 1

    def since(self, number: int) -> float:
        """Return when the connection was last released."""
        return self._since[number - self.first_number]

    def add(self, number: int, *, always: bool = False) -> None:
        """Watch *number*: once, until it is put back, or *always*."""
        self._set.add(number, always=always)

    def discard(self, number: int) -> None:
        """Stop watching *number*."""
        with contextlib.suppress(OSError, KeyError, ValueError):
            self._set.remove(number)

    def has_work(self) -> bool:
        """Whether something waits for a worker."""
        return self._set.is_ready()

    def close(self) -> None:
        """Close this process's descriptors."""
        os.close(self._table)
        # The mapping has a descriptor of its own. It must not wait for the collector.
        del self._serials, self._holders, self._since
        self._set.close()
        if self._reserve:
            self._reserve.close()


class Keeper:
    """The master's part: it keeps a descriptor of every connection in the lot, and never reads from one."""

    def __init__(self, lot: Lot, board: Scoreboard) -> None:
        """*board* tells everybody how many connections there are."""
        self._lot = lot
        self._board = board
        self._sockets: dict[int, socket.socket] = {}
        self._listeners: list[int] = []

    def __len__(self) -> int:
        return len(self._sockets)

    def numbers(self) -> list[int]:
        """Return the numbers of all connections in the lot."""
        return list(self._sockets)

    def watch(self, listeners: Sequence[socket.socket]) -> None:
        """Let the workers accept from *listeners*, and from no others."""
        numbers = [sock.fileno() for sock in listeners]
        for number in self._listeners:
            if number not in numbers:
                self._lot.discard(number)
        for number in numbers:
            if number not in self._listeners:
                self._lot.add(number)
        self._listeners = numbers

    def park(self, sock: socket.socket, limit: int) -> None:
        """Take a connection into the lot; when there are more than *limit*, the oldest silent one is closed."""
        if len(self._sockets) >= min(limit, self._lot.size - 1):
            self._close_oldest()
        number = fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, self._lot.first_number)
        self._sockets[number] = socket.socket(sock.family, sock.type, sock.proto, number)
        sock.close()
        self._board.in_lot = len(self)
        self._lot.new_serial(number)
        self._lot.add(number)

    def state(self) -> list[tuple[int, int]]:
        """Return the number and the address family of each connection."""
        return [(number, int(sock.family)) for number, sock in self._sockets.items()]

    def resume(self, connections: Iterable[tuple[int, int]], listeners: Iterable[socket.socket]) -> None:
        """Go on with what the program that was here before has put into the lot."""
        self._listeners = [sock.fileno() for sock in listeners]
        for number, family in connections:
            self._sockets[number] = socket.socket(family, socket.SOCK_STREAM, 0, number)

    def get(self, number: int) -> socket.socket | None:
        """Return the connection with *number*, if there is one."""
        return self._sockets.get(number)

    def drop(self, number: int) -> None:
        """Forget a connection that its client, or a worker, has ended."""
        sock = self._sockets.pop(number, None)
        if sock:
            self._board.in_lot = len(self)
            self._lot.discard(number)
            sock.close()

    def close(self, number: int) -> None:
        """Close a connection, by reset. Workers may still have duplicates: to close ours alone would not end it."""
        sock = self._sockets.get(number)
        if sock:
            abort(sock)
            self.drop(number)

    def lose_worker(self, slot: int) -> None:
        """Clean up after a worker that has ended: close what it held, and arm what it may have disarmed last.

        It may have been given something by the kernel that it did not come to note: arming what is armed is harmless.
        """
        for number in self.numbers():
            holder = self._lot.holder(number)
            if holder == slot:
                self.close(number)
            elif holder is None:
                self._lot.put_back(number)
        for number in self._listeners:
            self._lot.put_back(number)

    def expire(self, timeout: float, now: float) -> float:
        """Close what has been silent for *timeout* seconds. Return when to look again."""
        soonest = now + timeout
        for number in self.numbers():
            if self._lot.holder(number) is None:
                due = self._lot.since(number) + timeout
                if due <= now:
                    self._close_by_limit(number)
                else:
                    soonest = min(soonest, due)
        return soonest

    def _close_oldest(self) -> None:
        silent = [number for number in self._sockets if self._lot.holder(number) is None]
        if silent:
            self._close_by_limit(min(silent, key=self._lot.since))

    def _close_by_limit(self, number: int) -> None:
        self._board.closed_by_limits += 1
        self.close(number)

    def close_silent(self) -> None:
        """Close every connection that nobody serves. Of the others their workers say when they are done."""
        for number in self.numbers():
            if self._lot.holder(number) is None:
                self.close(number)

    def close_all(self) -> None:
        """Close what is left of all connections."""
        for number in self.numbers():
            self.drop(number)

    def inheritance(self) -> Inheritance:
        """Return what a fork will duplicate. No need for the worker to fetch these."""
        return {number: (self._lot.serial(number), sock) for number, sock in self._sockets.items()}


class _SharedSet:
    """An epoll set that survives the fork, shared: an event goes to one of the processes that wait."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll

    @classmethod
    def new(cls) -> Self:
        return cls(select.epoll())

    def wait(self, timeout: float = -1) -> int | None:
        events = self._epoll.poll(timeout, 1)
        return events[0][0] if events else None

    def add(self, number: int, *, always: bool) -> None:
        self._epoll.register(number, select.EPOLLIN | (0 if always else select.EPOLLONESHOT))

    def arm(self, number: int) -> None:
        self._epoll.modify(number, select.EPOLLIN | select.EPOLLONESHOT)

    def remove(self, number: int) -> None:
        self._epoll.unregister(number)

    def is_ready(self) -> bool:
        # To ask the set itself would disarm what it returns.
        poll = select.poll()
        poll.register(self._epoll, select.POLLIN)
        return bool(poll.poll(0))

    def fileno(self) -> int:
        return self._epoll.fileno()

    def close(self) -> None:
        self._epoll.close()


class _Bell(_SharedSet):
    """A shared set that wakes one waiting process each time somebody rings."""

    def __init__(self, epoll: select.epoll, clapper: int) -> None:
        super().__init__(epoll)
        self.clapper = clapper

    @classmethod
    def new(cls) -> Self:
        # A pipe whose writing end is closed is always readable: to arm it again is to ring once.
        clapper, writer = os.pipe()
        os.close(writer)
        bell = cls(select.epoll(), clapper)
        bell._epoll.register(clapper, 0)
        return bell

    def ring(self) -> None:
        self.arm(self.clapper)

    def close(self) -> None:
        super().close()
        os.close(self.clapper)


class _OwnSet:
    """Where there is no epoll: each process waits on its own, and an event goes to all of them.

    For listeners that is only less efficient: the losers find nothing. Connections cannot stand here.
    """

    def __init__(self) -> None:
        self._numbers: set[int] = set()

    def restrict_to(self, numbers: Iterable[int]) -> None:
        self._numbers = set(numbers)

    def wait(self, timeout: float = -1) -> int | None:
        # Made anew for each wait, since a selector does not survive a fork.
        with selectors.DefaultSelector() as selector:
            for number in self._numbers:
                selector.register(number, selectors.EVENT_READ)
            ready = selector.select(None if timeout < 0 else timeout)
        return ready[0][0].fd if ready else None

    def add(self, number: int, *, always: bool) -> None:  # noqa: ARG002 - nothing is ever disarmed here
        self._numbers.add(number)

    def arm(self, number: int) -> None:
        """Do nothing: nothing was disarmed."""

    def remove(self, number: int) -> None:
        self._numbers.discard(number)

    def is_ready(self) -> bool:
        return self.wait(0) is not None

    def close(self) -> None:
        self._numbers.clear()
