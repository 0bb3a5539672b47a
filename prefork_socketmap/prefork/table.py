"""The connection table: where all connections stand while no worker has them in hand, shared by all processes.

A worker that owned a connection for as long as the client keeps it open would be idle for most of its life: Postfix
processes keep theirs for a hundred seconds without a word. One that watched connections of its own would let them
all wait behind one slow lookup. So no worker owns any. All stand in one epoll set that the master makes before it
forks, each armed for exactly one event (EPOLLONESHOT): when a client speaks, the kernel hands its connection to one
waiting worker, and to nobody else until that worker arms it again. A stuck worker holds up one client; which workers
come and go is nothing that a client can see.

An entry of an epoll set is a pair of an open file and a *number*, the descriptor's (epoll(7), Q0). So all processes
use the same number for a connection. The master chooses it, in a range where nobody has anything else. A number that
is used again gets a new *serial*, by which a worker knows that its duplicate is of a connection that is gone. A
worker that is handed a connection of which it has no descriptor fetches one from the master. While that is away the
connection is *astray*: a worker that has one, or the master when it is back, puts it back into the set.

What a connection waits with (the beginning of a request, requests that are not answered yet, the end of a reply)
waits here, too, in a file without a name (``Buffers``), and its *stage* says what that is.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import select
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Self

from prefork_socketmap.prefork.shared import create_memory, is_ready, make_eventfd, view

MAX_CONNECTIONS = 1 << 20
BUFFER_LIMIT = 64 << 20
"""The most memory, in bytes, that all connections together wait with. One that has no more room for it is closed."""

_COLUMNS, _CELL = 8, 8  # of the table; bytes in a cell
_IN, _OUT, _ONCE = select.EPOLLIN, select.EPOLLOUT, select.EPOLLONESHOT


class Stage(enum.IntEnum):
    """What a connection waits for."""

    REQUEST = 0  # nothing is kept of it
    REST = 1  # of a request that has begun
    TURN = 2  # it has sent more requests than are answered in one turn
    READER = 3  # the client has to read a reply
    END = 4  # nothing more will be answered: what still comes is thrown away


# For each stage. A turn comes when it can be written to: at once, behind those that are waiting, but for a client
# that does not read.
EVENTS = (_IN | _ONCE, _IN | _ONCE, _OUT | _ONCE, _OUT | _ONCE, _IN | _ONCE)
ARMED = EVENTS[Stage.REQUEST]


@dataclass(frozen=True)
class TableState:
    """What the next program needs to go on with a table: descriptors, and the first number of a connection."""

    first: int
    set: int
    memory: int
    buffers: int
    nudged: int


class ConnectionTable:
    """The shared set, and what everybody needs to know of each connection. Made by the master before it forks.

    Connections have the numbers from *first* to *limit*, exclusively. Each cell has one writer at a time: whoever has
    taken the connection out of the set, and the master while nobody has.
    """

    def __init__(self, first: int, limit: int) -> None:
        size = min(limit - first, MAX_CONNECTIONS)
        memory, buffers = create_memory("connections", size * _COLUMNS * _CELL), create_memory("buffers")
        self._use(TableState(first, -1, memory, buffers, make_eventfd(1)))
        self.add(self.nudged, _ONCE)

    @classmethod
    def resume(cls, state: TableState) -> Self:
        """Go on with the table of the program that was here before."""
        table = cls.__new__(cls)
        table._use(state)
        return table

    def _use(self, state: TableState) -> None:
        self.first = state.first
        self._set = select.epoll() if state.set < 0 else select.epoll.fromfd(state.set)
        self.wait = self._set.poll
        """Wait for something to do: ``wait(timeout, maxevents)`` as epoll.poll. What it returns is disarmed."""
        self.modify = self._set.modify
        self._memory = state.memory
        self.buffers = Buffers(state.buffers)
        self.nudged = state.nudged
        """Always readable, and armed for one worker at a time."""
        cells = view(state.memory)
        self.size = len(cells) // (_COLUMNS * _CELL)
        width = self.size * _CELL
        columns = [cells[begin : begin + width] for begin in range(0, _COLUMNS * width, width)]
        self.serials = columns[0].cast("Q")
        self.since = columns[1].cast("d")
        """When it was in a worker's hands last."""
        self.deadlines = columns[2].cast("d")
        """When what it is in the middle of has to be over; 0.0: it is in the middle of nothing."""
        self.stages = columns[3].cast("Q")
        self.kept = columns[4].cast("Q")
        """How many bytes of input are kept."""
        self.missing = columns[5].cast("Q")
        """In REST: how many bytes of input are missing. In READER: how many of output."""
        self.astray = columns[7].cast("Q")
        """Its serial, when the kernel has handed it to a worker that cannot receive it, since the master is away."""
        self.output = columns[6].cast("Q")
        """In READER: how many bytes of output are kept, those included that the client has been sent meanwhile."""

    def state(self) -> TableState:
        """Return what the next program needs."""
        return TableState(self.first, self._set.fileno(), self._memory, self.buffers.fileno(), self.nudged)

    def begin(self, number: int, serial: int) -> None:
        """Begin the life of a new connection at *number*, out of the set until somebody arms it."""
        index = number - self.first
        self.forget(number)  # what somebody has written there since the last one's end is not this client's
        self.since[index] = monotonic()
        self.serials[index] = serial
        self.add(number, _ONCE)

    def end(self, number: int) -> None:
        """End it, and give back its memory. Called by the master, or by whom alone knows of it."""
        index = number - self.first
        self.serials[index] = 0
        self.discard(number)
        self.forget(number)

    def forget(self, number: int) -> None:
        """Give back all that is kept of a connection, if anything is: it begins anew."""
        index = number - self.first
        if not self.stages[index]:
            return
        self.buffers.free(index, 0, self.kept[index])
        self.buffers.free(index, Buffers.OUTPUT, self.output[index])
        self.kept[index] = self.missing[index] = self.output[index] = 0
        self.deadlines[index] = 0.0
        self.stages[index] = Stage.REQUEST

    def add(self, number: int, events: int = ARMED) -> None:
        """Watch *number*: once, until it is armed again, unless *events* say otherwise."""
        try:
            self._set.register(number, events)
        except FileExistsError:  # a worker must have meddled
            self.modify(number, events)

    def rearm(self, number: int, events: int = 0) -> None:
        """Put *number* back, as the master does: whatever workers may have done to the set.

        *events*: 0 means those that its connection waits for.
        """
        with contextlib.suppress(OSError):
            self.add(number, events or EVENTS[self.stages[number - self.first] % len(EVENTS)])

    def arm(self, number: int) -> None:
        """Put *number* back, armed for what its connection waits for. Raises OSError if it has been closed."""
        self.modify(number, EVENTS[self.stages[number - self.first] % len(EVENTS)])

    def leave_astray(self, number: int, serial: int) -> None:
        """Note that a worker cannot serve a connection that it was handed."""
        self.astray[number - self.first] = serial

    def nudge(self) -> None:
        """Wake a worker that waits on duty, if there is one, to look for what is astray."""
        self.rearm(self.nudged, ARMED)

    def bring_back(self, number: int, serial: int) -> bool:
        """If a connection is astray, note that it is not any more, and return True: the caller puts it back."""
        index = number - self.first
        if self.astray[index] != serial:
            return False
        self.astray[index] = 0
        return True

    def arm_listener(self, number: int) -> None:
        """Put a listener back. Raises OSError if it has been closed."""
        self.modify(number, ARMED)

    def discard(self, number: int) -> None:
        """Stop watching *number*."""
        with contextlib.suppress(OSError, ValueError):
            self._set.unregister(number)

    def is_ready(self, number: int) -> bool:
        """Whether what a connection waits for has happened. Never at its end: there, time is all that counts."""
        stage = self.stages[number - self.first] % len(EVENTS)
        if stage == Stage.END:
            return False
        return is_ready(number, EVENTS[stage] & (_IN | _OUT))

    def has_work(self) -> bool:
        """Whether something waits for a worker."""
        # To ask the set itself would disarm what it returns.
        return is_ready(self._set.fileno())

    def disarmed(self) -> set[int]:
        """Return the numbers that somebody has taken out of the set and not put back yet."""
        lines = Path(f"/proc/self/fdinfo/{self._set.fileno()}").read_text().splitlines()
        entries = (line.split() for line in lines if line.startswith("tfd:"))  # tfd: NUMBER events: MASK ...
        out = {int(entry[1]) for entry in entries if not int(entry[3], 16) & (_IN | _OUT)}
        return out - {self.nudged}

    def leave_to_fork(self) -> None:
        """In a process that a worker has forked: close what it could serve clients with, without touching the set."""
        self._set.close()
        os.closerange(self.first, self.first + self.size)

    def close(self) -> None:
        """Close this process's descriptors."""
        os.close(self._memory)
        del self.serials, self.since, self.deadlines, self.stages, self.kept, self.missing, self.output, self.astray
        self._set.close()
        self.buffers.close()
        os.close(self.nudged)


class Buffers:
    """What connections wait with. Memory is taken as it is written to, and given back by ``free``."""

    _AREA = 1 << 32  # of each connection, in a file that is mostly holes
    OUTPUT = 1 << 31  # where in it the output begins; before, there is input

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def put(self, index: int, offset: int, data: bytes) -> bool:
        """Store *data*; return whether there was room for it: in all, BUFFER_LIMIT bytes."""
        if offset + len(data) > self._AREA:  # somebody has written nonsense into the table
            return False
        if os.fstat(self._fd).st_blocks * 512 + len(data) > BUFFER_LIMIT:
            return False
        try:
            return os.pwrite(self._fd, data, index * self._AREA + offset) == len(data)
        except OSError:  # no memory, or a limit of the size of files
            return False

    def get(self, index: int, offset: int, size: int) -> bytes:
        """Return *size* bytes that were stored. Raises ValueError if it cannot be so many."""
        if size > BUFFER_LIMIT or not 0 <= offset <= self._AREA:
            raise ValueError(f"{size} bytes at {offset} cannot have been kept of a connection")
        return os.pread(self._fd, size, index * self._AREA + offset)

    def free(self, index: int, offset: int, size: int) -> None:
        """Give back *size* bytes that were stored."""
        size = min(size, self.OUTPUT, os.fstat(self._fd).st_size - index * self._AREA - offset)
        if size > 0:
            # The one way that Python has to punch a hole; what is not there can stay so.
            with (
                contextlib.suppress(OSError, ValueError),
                mmap.mmap(self._fd, size, offset=index * self._AREA + offset) as area,
            ):
                area.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)
