"""The scoreboard: shared memory in which each worker writes what it is doing, and from which everybody reads.

A worker writes its own row with plain stores, no system call and no lock. That is sound because every cell has one
writer and is an aligned machine word; a reader may see a row between two stores, never half a number. It is sized
for the largest process_limit: pages that nobody touches cost nothing.

The memory is a file. With a path, other programs can read it, without a question to anybody: ``Scoreboard.read``.

    header | names of tallies | states, a byte each | rows | tallies of slot 0 | of slot 1 | ...

Only a worker maps the tallies of its slot, and its master never does: the file ends with the last slot in use, and
nobody's address space has to hold what could be in use one day.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import monotonic, time
from typing import Self

from prefork_socketmap.prefork import memory
from prefork_socketmap.prefork.job import Job
from prefork_socketmap.prefork.tallies import LABEL_SIZE, MAX_NAMES, OTHER, TALLY_SIZE, Tallies, label

MAX_SLOTS = 20000  # twice the largest process_limit: during a reload two generations stand side by side

LAYOUT = 1
"""Of everything that is stored here. A program reads only what one with the same layout has written."""
_MAGIC = int.from_bytes(b"preforks", "big")

_NAMES = 4096
_STATES = _NAMES + MAX_NAMES * LABEL_SIZE
_ROWS = _STATES + MAX_SLOTS  # a multiple of 8, as all of these
_ROW_SIZE = 128
_PAGE = 0x10000  # the largest of any system; what a worker maps has to begin with one
_TALLIES = (_ROWS + MAX_SLOTS * _ROW_SIZE + _PAGE - 1) // _PAGE * _PAGE
_SLOT_SIZE = MAX_NAMES * TALLY_SIZE

# Words of a row. Times are CLOCK_MONOTONIC seconds; 0.0: none. The client's text takes up the rest.
_PID, _GENERATION, _SINCE, _JOB_STARTED, _CONNECTIONS, _REFUSED, _NEW, _JOB_NAME = range(8)
_CLIENT = 8 * 8
_CLIENT_SIZE = _ROW_SIZE - _CLIENT


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


class ScoreboardError(Exception):
    """A file is not a scoreboard that this program can read; the text says why."""


class _Word:
    """A word of the header, as an attribute of the board."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __get__(self, board: Scoreboard, owner: type[Scoreboard]) -> int:
        return board.words[self._index]

    def __set__(self, board: Scoreboard, value: int) -> None:
        board.words[self._index] = value


class Scoreboard:
    """The memory, and the numbers in it that concern everybody. Made by the master before it forks.

    ``view`` is the memory, ``words`` and ``times`` the same as numbers.
    """

    _magic = _Word(0)
    _layout = _Word(1)
    _slots = _Word(2)
    _names = _Word(3)
    knows_shortage = _Word(4)
    """Whether the master knows that few workers are idle, or can do nothing about it: no need to report it."""
    is_watched = _Word(5)
    """Whether the master looks after clients while no worker is at the front: no need to ask for it."""
    stopping = _Word(6)
    """Whether the server is stopping: then connections are closed, not parked."""
    in_lot = _Word(7)
    """How many connections are in the lot, those included that a worker serves at the moment."""
    closed_by_limits = _Word(8)
    """How many silent connections were closed because of max_parked and park_timeout."""
    pid = _Word(9)
    """The master's process id."""
    generation = _Word(10)
    """The number of the generation that serves; 0: none yet."""
    workers_spawned = _Word(11)
    workers_died = _Word(12)
    """How many workers have ended without being told to."""
    workers_killed = _Word(13)
    """How many did not react, or did not become ready, in time."""
    workers_throttled = _Word(14)
    """How often the start of workers was put off because one had failed."""
    reloads_good = _Word(15)
    reloads_refused = _Word(16)
    _started = 17  # as a time

    def __init__(self, path: Path | None = None) -> None:
        """Make a new board, at *path* in place of what is there, or without a name. Raises OSError."""
        self._path = path
        new = path and path.with_name(path.name + ".new")
        self._map(_make_file(new) if new else memory.create("scoreboard", _TALLIES))
        self._layout = LAYOUT
        self.pid = os.getpid()
        self.times[self._started] = time()
        self.learn([OTHER])
        self._magic = _MAGIC
        if path and new:
            new.replace(path)  # whole, and only now: nobody reads half a header

    @classmethod
    def resume(cls, fd: int, path: Path | None = None) -> Self:
        """Go on with the board of the program that was here before; *fd* is its descriptor, *path* its path if any.

        Raises ScoreboardError.
        """
        board = cls.__new__(cls)
        board._path = path
        _require_size(fd, path)
        board._map(fd)
        board._require_layout()
        return board

    @classmethod
    def read(cls, path: Path) -> Self:
        """Open the board at *path* for reading. Raises ScoreboardError, or OSError when it cannot be opened."""
        board = cls.__new__(cls)
        board._path = path
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _require_size(fd, path)
            board._use(memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_READ)))
        finally:
            os.close(fd)
        board._require_layout()
        return board

    def _map(self, fd: int) -> None:
        self._fd = fd
        self._use(memoryview(mmap.mmap(fd, _TALLIES)))

    def _use(self, view: memoryview) -> None:
        self.view = view
        self.states = view[_STATES : _STATES + MAX_SLOTS]
        self.words = view[:_TALLIES].cast("Q")
        self.times = view[:_TALLIES].cast("d")

    def _require_layout(self) -> None:
        if self._magic != _MAGIC:
            raise ScoreboardError(f"{self._path}: not a scoreboard")
        if self._layout != LAYOUT:
            raise ScoreboardError(
                f"{self._path}: a scoreboard with layout {self._layout}, of another version of the program; "
                f"this one reads layout {LAYOUT}"
            )

    def fileno(self) -> int:
        """Return the descriptor of the memory."""
        return self._fd

    def remove(self) -> None:
        """Remove the file, if it has a name. The memory goes with its last user."""
        if self._path:
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the descriptor, and let go of the memory."""
        os.close(self._fd)
        # The mapping has a descriptor of its own. It must not wait for the collector.
        del self.view, self.states, self.words, self.times

    @property
    def started(self) -> float:
        """When the master started, in seconds since the epoch."""
        return self.times[self._started]

    @property
    def connections(self) -> int:
        """How many connections there are: in the lot, and new ones that workers have."""
        return self.in_lot + sum(row.has_new for row in self.rows())

    def count(self, state: State) -> int:
        """Return how many workers are in *state*."""
        return bytes(self.states[: self._slots]).count(state)

    def count_idle(self) -> tuple[int, int]:
        """Return how many idle workers wait at the front, and how many in reserve."""
        states = bytes(self.states[: self._slots])
        return states.count(State.IDLE), states.count(State.RESERVE)

    def rows(self) -> list[Row]:
        """Return the rows of all slots that have ever been used."""
        return [Row(self, slot) for slot in range(self._slots)]

    def claim(self, generation: int) -> Row:
        """Take the first free slot for a new worker. Called by the master alone. Raises OSError: no room."""
        used = bytes(self.states[: self._slots])
        slot = used.find(State.FREE)
        self._make_room(len(used) if slot < 0 else slot)
        if slot < 0:
            slot = len(used)
            self._slots = slot + 1
        row = Row(self, slot)
        row.begin(generation)
        return row

    def _make_room(self, slot: int) -> None:
        """Let the file reach to the end of *slot*, and reserve what the worker in it will write.

        A store into a file on a disk that is full would kill it (SIGBUS).
        """
        begin = _TALLIES + slot * _SLOT_SIZE
        os.ftruncate(self._fd, max(os.fstat(self._fd).st_size, begin + _SLOT_SIZE))
        _reserve(self._fd, _ROWS + slot * _ROW_SIZE, _ROW_SIZE, self._path)
        _reserve(self._fd, begin, self._names * TALLY_SIZE, self._path)

    # Tallies.

    def learn(self, names: Iterable[str]) -> None:
        """Give each of *names* that has none yet a tally, in workers that are forked from now on.

        Called by the master alone. A name keeps its place for good; when MAX_NAMES have one the rest gets none.
        """
        known = self.labels()
        for new in dict.fromkeys(map(label, names)):
            if new not in known and self._names < MAX_NAMES:
                begin = _NAMES + self._names * LABEL_SIZE
                self.view[begin : begin + len(new)] = new
                self._names += 1

    def labels(self) -> list[bytes]:
        """Return the names that have a tally, by its index, as they are stored."""
        names = bytes(self.view[_NAMES : _NAMES + self._names * LABEL_SIZE])
        return [names[begin : begin + LABEL_SIZE].rstrip(b"\0") for begin in range(0, len(names), LABEL_SIZE)]

    def names(self) -> list[str]:
        """Return the names that have a tally, by its index."""
        return [name.decode("utf-8", "replace") for name in self.labels()]

    def open_tallies(self, slot: int, labels: Sequence[bytes]) -> Tallies:
        """Map the tallies of *slot*, to be written by the worker in it; *labels*: the names that it knows."""
        mapped = mmap.mmap(self._fd, len(labels) * TALLY_SIZE, offset=_TALLIES + slot * _SLOT_SIZE)
        return Tallies(labels, memoryview(mapped))

    def tallies(self, slot: int) -> Tallies:
        """Return the tallies of *slot* on a board that was opened for reading; none if it was not there then."""
        begin = _TALLIES + slot * _SLOT_SIZE
        room = max(len(self.view) - begin, 0) // TALLY_SIZE
        return Tallies(self.labels()[:room], self.view[begin:])


def _make_file(path: Path) -> int:
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        undo.callback(path.unlink)
        os.fchmod(fd, 0o644)  # whatever the umask: everybody may read it
        _reserve(fd, 0, _ROWS, path)
        os.ftruncate(fd, _TALLIES)
        undo.pop_all()
    return fd


def _reserve(fd: int, begin: int, size: int, path: Path | None) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, begin, size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path or "scoreboard")) from error


def _require_size(fd: int, path: Path | None) -> None:
    size = os.fstat(fd).st_size
    if size < _TALLIES:
        raise ScoreboardError(f"{path}: not a scoreboard, or cut short: it has {size} bytes, of {_TALLIES} at least")


class Row:
    """One worker's row. The worker writes it; the master writes it only before the fork and after the end."""

    def __init__(self, board: Scoreboard, slot: int) -> None:
        self.slot = slot
        self._board = board
        self._words = board.words
        self._times = board.times
        self._base = (_ROWS + slot * _ROW_SIZE) // 8
        self._job_started = self._base + _JOB_STARTED
        self._job_name = self._base + _JOB_NAME

    def begin(self, generation: int) -> None:
        """Start a new life in this slot. The counters of connections go on."""
        self._words[self._base + _GENERATION] = generation
        self._times[self._job_started] = 0.0
        self.has_new = False
        self.set_state(State.STARTING)

    @property
    def generation(self) -> int:
        """The number of the worker's generation."""
        return self._words[self._base + _GENERATION]

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
    def job_name(self) -> int:
        """What the latest job is for: the index of its tally's name."""
        return self._words[self._job_name]

    def job(self, left: float) -> Job:
        """Return what the worker notes its jobs with; *left*: how many it may do."""
        name, started = self._job_name, self._job_started
        return Job(self._words[name : name + 1], self._times[started : started + 1], left)

    @property
    def connections(self) -> int:
        """How many connections workers in this slot have accepted, ever."""
        return self._words[self._base + _CONNECTIONS]

    @property
    def client(self) -> str:
        """The client that is served, or was served last."""
        begin = self._base * 8 + _CLIENT
        text = bytes(self._board.view[begin : begin + _CLIENT_SIZE])
        return text.rstrip(b"\0").decode("ascii", "replace")

    @client.setter
    def client(self, value: str) -> None:
        begin = self._base * 8 + _CLIENT
        self._board.view[begin : begin + _CLIENT_SIZE] = value.encode("ascii", "replace")[:_CLIENT_SIZE].ljust(
            _CLIENT_SIZE, b"\0"
        )

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
