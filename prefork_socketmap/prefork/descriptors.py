"""The descriptors that a worker has of connections: inherited, accepted, or fetched from the master, and kept.

An entry of the shared set is a pair of an open file and a number (see ``table``), so each is put at the number that
the master has given it. Serials only grow: a worker knows all connections up to one, its horizon, and fetches all
younger ones together when it meets the first of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from time import monotonic

from prefork_socketmap.prefork.channel import Given, Kind, read_answer
from prefork_socketmap.prefork.connection import Connection, Job, Timeouts
from prefork_socketmap.prefork.shared import Shared

# Seconds: a master that takes so long to answer is away (stopped, or very busy), and for so long it is left alone.
_ANSWER_TIME, _AWAY = 0.01, 0.1
_FEW = 16
"""So many descriptors of connections that have ended are none too many."""


class Descriptors:
    """What this process has. ``known`` are the connections that it has met, by number; some may have ended."""

    def __init__(self, inherited: dict[int, Given], horizon: int, shared: Shared, limits: Timeouts, job: Job) -> None:
        """*inherited*: what the fork has duplicated, by number: all connections that came up to *horizon*."""
        self.known: dict[int, Connection] = {}
        self._inherited = inherited
        self._horizon = horizon
        self._board = shared.board
        self._cleaned_at = self._board.ended
        self._away_until = 0.0
        self._table = shared.table
        self._to_master = shared.to_master
        self._limits = limits
        self._job = job

    def receive(self, number: int, serial: int) -> Connection | None:
        """Return the connection that has *number* and *serial*; None when it has gone, or the master is away."""
        inherited = self._inherited.get(number)
        if inherited and inherited.serial == serial:
            return self._learn(self._inherited.pop(number))
        horizon = -1
        while horizon < self._horizon and monotonic() >= self._away_until:
            horizon = self._horizon
            self._fetch()
            connection = self.known.get(number)
            if connection and connection.serial == serial:
                return connection
        return None

    def find(self, is_wanted: Callable[[int, int], bool]) -> list[Connection]:
        """Return which of the connections that this process has are wanted, by number and serial."""
        found = [each for each in self.known.values() if is_wanted(each.number, each.serial)]
        inherited = [number for number, given in self._inherited.items() if is_wanted(number, given.serial)]
        return found + [self._learn(self._inherited.pop(number)) for number in inherited]

    def settle(self, connection: Connection, number: int, serial: int) -> None:
        """Put a connection that this worker has accepted at a place that is reserved for it."""
        sock = connection.sock
        given = self._place(Given(number, serial, 0, sock.family, sock.detach()))
        connection.settle(number, serial, _socket(given))
        self.known[number] = connection

    def forget(self, number: int) -> None:
        """Close what this process has at *number*."""
        connection = self.known.pop(number, None)
        if connection:
            connection.sock.close()
        elif self._inherited.pop(number, None):
            os.close(number)

    def forget_the_gone(self) -> None:
        """Close what this process still has of connections that have ended, if there may be many of them."""
        ended = self._board.ended
        if ended - self._cleaned_at < _FEW + len(self.known) // 4:
            return  # to look through all of them each time would cost more than the few descriptors
        self._cleaned_at = ended
        serials, first = self._table.serials, self._table.first
        gone = [number for number, known in self.known.items() if known.serial != serials[number - first]]
        gone += [number for number, given in self._inherited.items() if given.serial != serials[number - first]]
        for number in gone:
            self.forget(number)

    def leave_to_fork(self) -> None:
        """In a process that a worker has forked: leave the descriptors to whoever closes them all at once."""
        for connection in self.known.values():
            connection.sock.detach()

    def _fetch(self) -> None:
        """Ask the master for all connections beyond the horizon."""
        self.forget_the_gone()
        answers, enclosed = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with answers, self._master_away():
            with enclosed:
                self._to_master.send(Kind.FETCH, serial=self._horizon, enclosed=(enclosed,))
            answers.settimeout(_ANSWER_TIME)
            while batch := read_answer(answers):
                for given in batch:
                    self._horizon = given.arrival
                    if self._has(given):
                        os.close(given.fd)
                    else:
                        self._learn(self._place(given))

    @contextlib.contextmanager
    def _master_away(self) -> Iterator[None]:
        """Note that the master does not answer: it is not asked again for a moment."""
        try:
            yield
        except OSError:
            self._away_until = monotonic() + _AWAY

    def _has(self, given: Given) -> bool:
        known = self.known.get(given.number)
        return known is not None and known.serial == given.serial

    def _learn(self, given: Given) -> Connection:
        sock = _socket(given)
        connection = self.known[given.number] = Connection(sock, self._table, self._limits, self._job)
        connection.settle(given.number, given.serial, sock)
        return connection

    def _place(self, given: Given) -> Given:
        """Put a connection that the master has given at its number."""
        self.forget(given.number)
        # Not dup2(2): it would close whatever a map's code has open under this number.
        got = fcntl.fcntl(given.fd, fcntl.F_DUPFD_CLOEXEC, given.number)
        os.close(given.fd)
        if got != given.number:
            os.close(got)
            raise RuntimeError(f"descriptor {given.number} is in use: the code of a map has too many files open")
        return given._replace(fd=got)


def _socket(given: Given) -> socket.socket:
    return socket.socket(given.family, socket.SOCK_STREAM, 0, given.fd)
