"""The lot: connections that nobody serves at the moment, kept open by the master until their clients speak again.

The master watches them without reading a byte. A connection that becomes readable is passed on to the workers, who
take it as they take one from a listener; the master's descriptor of it is closed then, while the connection itself
lives on in the message and in the worker.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import selectors
import socket
import termios
from collections import deque
from collections.abc import Iterator
from time import monotonic

from prefork_socketmap.prefork.channel import Channel, Kind
from prefork_socketmap.prefork.scoreboard import Scoreboard


class Lot:
    """The parked connections, oldest first. ``fileno`` is readable when ``work`` has something to do."""

    def __init__(self, to_workers: Channel, board: Scoreboard) -> None:
        to_workers.sock.setblocking(False)
        self._to_workers = to_workers
        self._board = board
        self._selector = selectors.DefaultSelector()
        self._parked: dict[socket.socket, float] = {}
        # Connections whose clients have spoken, for which the channel to the workers had no room.
        self._queue: deque[socket.socket] = deque()
        self._sent = 0

    def fileno(self) -> int:
        """Return the descriptor to wait on: the selector's own."""
        return self._selector.fileno()

    def __iter__(self) -> Iterator[socket.socket]:
        return iter([*self._parked, *self._queue])

    @property
    def under_way(self) -> int:
        """How many connections have been passed on and not yet been taken by a worker."""
        return len(self._queue) + self._sent - sum(row.taken for row in self._board.rows())

    def park(self, connection: socket.socket, limit: int) -> None:
        """Keep *connection*, and close the oldest ones beyond *limit*."""
        self._parked[connection] = monotonic()
        self._selector.register(connection, selectors.EVENT_READ)
        while len(self._parked) > limit:
            self._close(next(iter(self._parked)))
        self._board.parked = len(self._parked)

    def work(self) -> None:
        """Pass on the connections whose clients have spoken; close those whose clients have hung up."""
        for key, _ in self._selector.select(0):
            if key.fileobj is self._to_workers:
                self._pass_queued()
            elif _unread(key.fd):
                self._unpark(key.fileobj)  # type: ignore[arg-type]
            else:
                self._close(key.fileobj)  # type: ignore[arg-type]
        self._board.parked = len(self._parked)

    def _unpark(self, connection: socket.socket) -> None:
        # Before it is closed here: the selector would go on watching what lives on elsewhere.
        self._selector.unregister(connection)
        del self._parked[connection]
        if self._queue or not self._pass(connection):
            if not self._queue:
                self._selector.register(self._to_workers, selectors.EVENT_WRITE)
            self._queue.append(connection)

    def _pass(self, connection: socket.socket) -> bool:
        """Send *connection* to the workers; return whether the channel had room for it."""
        try:
            self._to_workers.send(Kind.CONNECTION, connection=connection)
        except OSError:
            return False
        self._sent += 1
        connection.close()
        return True

    def _pass_queued(self) -> None:
        while self._queue and self._pass(self._queue[0]):
            self._queue.popleft()
        if not self._queue:
            self._selector.unregister(self._to_workers)

    def expire(self, timeout: float, now: float) -> float:
        """Close what has been parked for *timeout* seconds. Return when to be called again."""
        while self._parked:
            connection, since = next(iter(self._parked.items()))
            if now < since + timeout:
                return since + timeout
            self._close(connection)
        self._board.parked = 0
        return now + timeout

    def _close(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._parked[connection]
        connection.close()

    def close_all(self) -> None:
        """Close every connection."""
        for connection in [*self._parked]:
            self._close(connection)
        while self._queue:
            self._queue.popleft().close()
        with contextlib.suppress(KeyError):
            self._selector.unregister(self._to_workers)
        self._board.parked = 0

    def forget(self) -> None:
        """In a new worker: close what the fork has duplicated, the master's end of the channel included."""
        self._selector.close()
        for connection in self:
            connection.close()
        self._to_workers.close()


def _unread(fd: int) -> int:
    """Return how many bytes can be read from a socket; 0, for one that is readable, means that it has ended."""
    number = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, number)
    return number[0]
