"""The scoreboard: shared memory in which each worker writes what it is doing, and from which everybody reads.

A worker writes its own row with plain stores, no system call and no lock. That is sound because every cell has one
writer and is an aligned machine word; a reader may see a row between two stores, never half a number. It is sized
for the largest process_limit: pages that nobody touches cost nothing.
"""

from __future__ import annotations

import enum
import mmap
from time import monotonic

MAX_SLOTS = 20000  # twice the largest process_limit: during a reload two generations stand side by side

_HEADER_SIZE = 4096
_ROW_SIZE = 128
_ROW_WORDS = _ROW_SIZE // 8
_STATES = _HEADER_SIZE
_ROWS = _HEADER_SIZE + (MAX_SLOTS // 4096 + 1) * 4096
_SIZE = _ROWS + MAX_SLOTS * _ROW_SIZE

# Words of the header.
_SLOTS, _KNOWS_SHORTAGE, _IS_WATCHED, _STOPPING, _IN_LOT = range(5)
# Words of a row. Times are CLOCK_MONOTONIC seconds; 0.0: none.
_PID, _GENERATION, _SINCE, _JOB_STARTED, _JOBS, _CONNECTIONS, _REFUSED, _NEW = range(8)


class State(enum.IntEnum):
    """What a worker is doing."""

    FREE = 0  # no worker in this slot
    STARTING = 1
    IDLE = 2  # waits at the front for a connection
    RESERVE = 3  # waits to be called to the front
    BUSY = 4  # serves a connection
    WAITING = 5  # holds a connection that is silent
    LEAVING = 6
    STOPPED = 7  # by a signal, not by us


class Scoreboard:
    """The memory, and the few numbers in it that concern everybody. Made by the master before it forks."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE)
        view = memoryview(self._memory)
        self.states = view[_STATES : _STATES + MAX_SLOTS]
        self.words = view.cast("Q")
        self.times = view.cast("d")

    @property
    def knows_shortage(self) -> bool:
        """Whether the master knows that few workers are idle, or can do nothing about it: no need to report it."""
        return bool(self.words[_KNOWS_SHORTAGE])

    @knows_shortage.setter
    def knows_shortage(self, value: bool) -> None:
        self.words[_KNOWS_SHORTAGE] = value

    @property
    def is_watched(self) -> bool:
        """Whether the master looks after clients while no worker is at the front: no need to ask for it."""
        return bool(self.words[_IS_WATCHED])

    @is_watched.setter
    def is_watched(self, value: bool) -> None:
        self.words[_IS_WATCHED] = value

    @property
    def stopping(self) -> bool:
        """Whether the server is stopping: then connections are closed, not parked."""
        return bool(self.words[_STOPPING])

    @stopping.setter
    def stopping(self, value: bool) -> None:
        self.words[_STOPPING] = value

    @property
    def in_lot(self) -> int:
        """How many connections are in the lot, those included that a worker serves at the moment."""
        return self.words[_IN_LOT]

    @in_lot.setter
    def in_lot(self, value: int) -> None:
        self.words[_IN_LOT] = value

    @property
    def connections(self) -> int:
        """How many connections there are: in the lot, and new ones that workers have."""
        return self.in_lot + sum(row.has_new for row in self.rows())

    def count(self, state: State) -> int:
        """Return how many workers are in *state*."""
        return bytes(self.states[: self.words[_SLOTS]]).count(state)

    def count_idle(self) -> tuple[int, int]:
        """Return how many idle workers wait at the front, and how many in reserve."""
        states = bytes(self.states[: self.words[_SLOTS]])
        return states.count(State.IDLE), states.count(State.RESERVE)

    def rows(self) -> list[Row]:
        """Return the rows of all slots that have ever been used."""
        return [Row(self, slot) for slot in range(self.words[_SLOTS])]

    def claim(self, generation: int) -> Row:
        """Take the first free slot for a new worker. Called by the master alone."""
        used = bytes(self.states[: self.words[_SLOTS]])
        slot = used.find(State.FREE)
        if slot < 0:
            slot = len(used)
            self.words[_SLOTS] = slot + 1
        row = Row(self, slot)
        row.begin(generation)
        return row


class Row:
    """One worker's row. The worker writes it; the master writes it only before the fork and after the end."""

    def __init__(self, board: Scoreboard, slot: int) -> None:
        self.slot = slot
        self._board = board
        self._words = board.words
        self._times = board.times
        self._base = (_ROWS + slot * _ROW_SIZE) // 8
        self._job_started = self._base + _JOB_STARTED
        self._jobs = self._base + _JOBS

    def begin(self, generation: int) -> None:
        """Start a new life in this slot. The counters of jobs and connections go on."""
        self._words[self._base + _GENERATION] = generation
        self._times[self._job_started] = 0.0
        self.has_new = False
        self.set_state(State.STARTING)

    def end(self) -> None:
        """Free the slot."""
        self._words[self._base + _PID] = 0
        self.has_new = False
        self.set_state(State.FREE)

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._words[self._base + _PID]

    @pid.setter
    def pid(self, value: int) -> None:
        self._words[self._base + _PID] = value

    @property
    def state(self) -> State:
        """What the worker is doing."""
        return State(self._board.states[self.slot])

    def set_state(self, state: State) -> None:
        """Enter *state*, now."""
        self._times[self._base + _SINCE] = monotonic()
        self._board.states[self.slot] = state

    @property
    def since(self) -> float:
        """When the worker entered its state."""
        return self._times[self._base + _SINCE]

    @property
    def job_started(self) -> float:
        """When the job under way began; 0.0 when there is none."""
        return self._times[self._job_started]

    @property
    def jobs(self) -> int:
        """How many jobs workers in this slot have begun, ever."""
        return self._words[self._jobs]

    def job_begins(self) -> None:
        """Note that a job begins: from now on it may be interrupted when it takes too long."""
        self._words[self._jobs] += 1
        self._times[self._job_started] = monotonic()

    def job_ends(self) -> float:
        """Note that the job is over; return how long it took."""
        started = self._times[self._job_started]
        self._times[self._job_started] = 0.0
        return monotonic() - started

    @property
    def connections(self) -> int:
        """How many connections workers in this slot have accepted, ever."""
        return self._words[self._base + _CONNECTIONS]

    @property
    def has_new(self) -> bool:
        """Whether the worker serves a connection that is not in the lot (yet)."""
        return bool(self._words[self._base + _NEW])

    @has_new.setter
    def has_new(self, value: bool) -> None:
        self._words[self._base + _NEW] = value

    @property
    def refused(self) -> int:
        """How many connections workers in this slot have refused, ever."""
        return self._words[self._base + _REFUSED]

    def count_connection(self) -> None:
        """Count a connection."""
        self._words[self._base + _CONNECTIONS] += 1

    def count_refused(self) -> None:
        """Count a connection that was refused."""
        self._words[self._base + _REFUSED] += 1
