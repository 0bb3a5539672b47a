"""The master's part of the connection table: it keeps a descriptor of every connection, and never reads from one.

It decides which new connections are kept, and ends those that have taken too long or whose worker has died.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from time import monotonic

from prefork_socketmap.prefork.channel import Given
from prefork_socketmap.prefork.connection import REASONS, client_of, reset
from prefork_socketmap.prefork.scoreboard import RESERVATIONS, Row, Scoreboard
from prefork_socketmap.prefork.shared import let_go
from prefork_socketmap.prefork.table import ARMED, ConnectionTable, Stage

log = logging.getLogger("prefork_socketmap.master")

_NEVER = float("inf")
_SHORTEST_LOOK = 0.1  # between two looks at all deadlines
_SEARCH_PAUSE = 1.0  # between two searches for connections that can be closed, when there were none
_SETTLING = 0.05  # how long a worker may take to note what the kernel has given it


@dataclass(frozen=True)
class ConnectionsState:
    """What the next program needs to go on. JSON may have turned keys into text and tuples into lists."""

    places: Sequence[Given]
    newest: int
    latest_serial: int
    next_free: int
    free: Sequence[int]
    reserved: Mapping[int, Mapping[int, int]]


class Connections:
    """All connections, by number. Times are seconds of the monotonic clock."""

    def __init__(self, table: ConnectionTable, board: Scoreboard) -> None:
        self.newest = 0
        """How many there have been: each has the number of its arrival."""
        self._table = table
        self._board = board
        self._places: dict[int, Given] = {}
        self._listeners: list[int] = []
        self._latest_serial = 0
        # In a small table fewer, or else they would take up all of it.
        self._reservations = max(min(RESERVATIONS, table.size // 64), 1)
        self._reserved: dict[int, dict[int, int]] = {}
        self._short: dict[int, Row] = {}
        self._free: list[int] = []
        self._next_free = table.first
        self._silent: list[tuple[float, int]] = []
        self._next_search = 0.0
        self._suspects: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._places)

    def limit(self, configured: int) -> int:
        """Return the most connections: *configured*, if that is not 0, or what there are descriptors for."""
        size = self._table.size
        room = max(size - self._reservations * (self._board.slots + 1), size // 2)
        return min(configured or room, room)

    # Listeners.

    def watch(self, listeners: Sequence[socket.socket]) -> None:
        """Let the workers accept from *listeners*, and from no others."""
        numbers = [sock.fileno() for sock in listeners]
        for number in self._listeners:
            if number not in numbers:
                self._table.discard(number)
        for number in numbers:
            if number not in self._listeners:
                self._table.add(number)
        self._listeners = numbers

    # Connections that come.

    def reserve(self, row: Row) -> None:
        """Let the worker of *row* have places for the next connections that it accepts: it need not wait for one."""
        reserved = self._reserved.setdefault(row.slot, {})
        self._short.pop(row.slot, None)
        for index, (number, _) in enumerate(row.reservations()):
            if number or len(reserved) >= self._reservations:
                continue
            number = self._free_number()
            if not number:
                self._short[row.slot] = row  # its turn comes when a connection goes
                return
            self._latest_serial += 1
            reserved[number] = self._latest_serial
            row.set_reservation(index, number, self._latest_serial)

    def _set_free(self, number: int) -> None:
        self._free.append(number)
        if self._short:
            self.reserve(next(iter(self._short.values())))

    def _free_number(self) -> int:
        if self._free:
            return self._free.pop()
        if self._next_free >= self._table.first + self._table.size:
            return 0
        self._next_free += 1
        return self._next_free - 1

    def release_reservations(self, row: Row) -> None:
        """Take back what the worker of *row*, which has ended, has not used."""
        self._short.pop(row.slot, None)
        row.clear_reservations()
        for number in self._reserved.pop(row.slot, {}):
            self._table.end(number)  # it may have been about to hand one over
            self._set_free(number)

    def has_reserved(self, row: Row, number: int, serial: int) -> bool:
        """Whether *number* and *serial* were reserved for the worker of *row*."""
        return self._reserved.get(row.slot, {}).get(number) == serial

    def keep(self, row: Row, place: Given, limit: int, idle_timeout: float, *, is_armed: bool) -> None:
        """Take in a new connection, at the place that was reserved for it. The descriptor in *place* is consumed.

        When there are *limit* already, one that has been silent for *idle_timeout* (0: none) makes room; if there is
        none the new one is refused. *is_armed*: the worker has put it into the set itself.
        """
        del self._reserved[row.slot][place.number]
        has_room = len(self) < limit or self._make_room(idle_timeout or _NEVER)
        got = fcntl.fcntl(place.fd, fcntl.F_DUPFD_CLOEXEC, place.number)
        let_go(place.fd)
        self.newest += 1
        self._places[got] = place._replace(fd=got, arrival=self.newest)
        if has_room:
            self._board.connections = len(self)
        else:
            self._give_up(got, "refused")
        if has_room and not is_armed:
            self._table.rearm(got)
        self.reserve(row)

    def bring_back(self) -> None:
        """Put back what workers could not receive while the master was away."""
        if not self._board.astray:
            return
        self._board.astray = 0  # before the search: one that is too late for it says so again
        for number, place in self._places.items():
            if self._table.bring_back(number, place.serial):
                self._table.rearm(number)

    def younger_than(self, arrival: int) -> list[Given]:
        """Return all connections that came after *arrival*, the oldest first."""
        found = list(takewhile(lambda place: place.arrival > arrival, reversed(self._places.values())))
        return found[::-1]

    def inheritance(self) -> dict[int, Given]:
        """Return what a fork duplicates: all connections up to ``newest``, by number."""
        return self._places

    # Connections that go.

    def has(self, number: int, serial: int) -> bool:
        """Whether the connection with *number* still is the one with *serial*."""
        return number in self._places and self._places[number].serial == serial

    def may_have_met(self, pid: int, horizon: int, number: int, serial: int) -> bool:
        """Whether a worker can have had the connection with *number* and *serial*, which may be gone by now.

        It has been given all that came up to arrival number *horizon*, and has accepted some itself.
        """
        if self.has(number, serial):
            place = self._places[number]
            return place.arrival <= horizon or place.keeper == pid
        return self._table.first <= number < self._next_free and 0 < serial <= self._latest_serial

    def drop(self, number: int) -> None:
        """Forget a connection: it ends when nobody else has a descriptor."""
        if self._places.pop(number, None):
            self._board.connections = len(self)
            self._board.ended += 1
            self._table.end(number)
            let_go(number)
            self._set_free(number)

    def close(self, number: int) -> None:
        """End a connection, by reset. Workers may still have duplicates: to close ours alone would not end it."""
        place = self._places.get(number)
        if place:
            self._table.discard(number)  # first: no worker shall see the end as the client's
            reset(number, place.family)
            self.drop(number)

    def _give_up(self, number: int, counter: str) -> None:
        """Close a connection for a reason that one of the counters of connections stands for, and tell."""
        self._board.increment("connections", counter)
        level, text = REASONS[counter]
        if log.isEnabledFor(level):
            family = self._places[number].family
            with socket.socket(family, socket.SOCK_STREAM, fileno=os.dup(number)) as sock:
                # Clients choose how often: whoever writes the log may count what is marked so.
                log.log(level, text, client_of(sock), extra={"counted": True})
        self.close(number)

    def _held(self) -> set[int]:
        """Return the numbers of connections that workers are serving."""
        return {row.held for row in self._board.rows()}

    def expire(self, keepalive_timeout: float, now: float) -> float:
        """Close what has been silent, or in the middle of something, for too long. Return when to look again.

        But not when a client has done its part, and waits for a worker.
        """
        table, held = self._table, self._held()
        soonest = _NEVER
        for number in list(self._places):
            index = number - table.first
            deadline = table.deadlines[index]
            due = deadline or (table.since[index] + keepalive_timeout if keepalive_timeout else _NEVER)
            if due > now or number in held or (deadline and table.is_ready(number)):
                soonest = min(soonest, due)
                continue
            if table.stages[index] == Stage.END:
                self.close(number)
            else:
                self._give_up(number, "timed_out" if deadline else "expired")
        return max(soonest, now + _SHORTEST_LOOK)

    def _make_room(self, idle_timeout: float) -> bool:
        """Close the connection that has been silent for longest, if that is *idle_timeout*; return whether."""
        now = monotonic()
        table = self._table
        if not self._silent and now >= self._next_search:
            held = self._held()
            since = ((table.since[number - table.first], number) for number in self._places if number not in held)
            # Many at once, since to look at all of them for each newcomer would cost too much.
            self._silent = sorted((entry for entry in since if entry[0] <= now - idle_timeout), reverse=True)
            self._next_search = now + min(_SEARCH_PAUSE, idle_timeout)
        while self._silent:
            when, number = self._silent.pop()
            if number in self._places and table.since[number - table.first] == when and number not in self._held():
                self._give_up(number, "evicted")
                return True
        return False

    def close_silent(self) -> None:
        """Close every connection that nobody serves. Of the others their workers say when they are done."""
        held = self._held()
        for number in list(self._places):
            if number not in held:
                self.close(number)

    def close_all(self) -> None:
        """Close what is left of all connections."""
        for number in list(self._places):
            self.drop(number)

    # Workers that die.

    def lose_worker(self, row: Row) -> None:
        """Clean up after a worker that has died: close what it served, and suspect what it may have taken last.

        The kernel may have given it something that it did not come to note. Whatever is out of the set, and in
        nobody's hands for long enough that a living worker would have noted it, is put back by ``clear_suspects``.
        """
        if row.held in self._places or row.job_started:  # a job of a new client is done before that is in the table
            self._board.increment("connections", "lost")
        self.close(row.held)
        for number in self._listeners:
            self._table.rearm(number, ARMED)
        self._table.nudge()  # the kernel may have woken nobody but the dead, with something still to take
        due = monotonic() + _SETTLING
        self._suspects = {number: self._suspects.get(number, due) for number in self._unaccounted()}

    def _unaccounted(self) -> set[int]:
        return (self._table.disarmed() & self._places.keys()) - self._held()

    def clear_suspects(self, now: float) -> float:
        """Put back what a dead worker had taken. Return when to call again."""
        due = {number for number, when in self._suspects.items() if when <= now}
        for number in due & self._unaccounted() if due else ():
            self._table.rearm(number)
        for number in due:
            del self._suspects[number]
        return min(self._suspects.values(), default=_NEVER)

    # Upgrades.

    def state(self) -> ConnectionsState:
        """Return what the next program needs."""
        return ConnectionsState(
            list(self._places.values()),
            self.newest,
            self._latest_serial,
            self._next_free,
            self._free,
            {**self._reserved},
        )

    def resume(self, state: ConnectionsState, listeners: Iterable[socket.socket]) -> None:
        """Go on with what the program that was here before has taken in."""
        self._listeners = [sock.fileno() for sock in listeners]
        self._places = {place[0]: Given(*place) for place in state.places}
        self.newest, self._latest_serial = state.newest, state.latest_serial
        self._next_free, self._free = state.next_free, list(state.free)
        self._reserved = {
            int(slot): {int(number): serial for number, serial in reserved.items()}
            for slot, reserved in state.reserved.items()
        }
