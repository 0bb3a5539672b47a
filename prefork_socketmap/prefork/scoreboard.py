"""The scoreboard: shared memory in which each worker writes what it is doing, and from which everybody reads.

A worker writes its own row with plain stores, no system call and no lock. That is sound because every cell has one
writer and is an aligned machine word; a reader may see a row between two stores, never half a number. It is sized
for the largest process_limit: pages that nobody touches cost nothing.

The memory is a file. With a path, other programs can read it, without a question to anybody: ``Scoreboard.read``.

    header | paces | deaths | names of jobs | states, a byte each | rows | counters of slot 0 | of slot 1 | ...

Only a worker maps the counters of its slot, and its master never does: the file ends with the last slot in use, and
nobody's address space has to hold what could be in use one day.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from time import monotonic, time
from typing import Self

from prefork_socketmap.prefork import counters
from prefork_socketmap.prefork.counters import (
    COUNTERS_SIZE,
    LABEL_SIZE,
    MAX_NAMES,
    OTHER,
    SERVER_COUNTERS,
    SlotCounters,
    label,
    server_counter,
)
from prefork_socketmap.prefork.layout import constants, fingerprint
from prefork_socketmap.prefork.shared import create_memory, view

MAX_SLOTS = 20000  # twice the largest process_limit: during a reload two generations stand side by side

_MAGIC = int.from_bytes(b"preforks", "big")
_HEADER = struct.Struct("@QQ")  # magic, layout

_COUNTERS, _MOST_COUNTERS = 32, 16  # the first word of the header's, and room for so many: see SERVER_COUNTERS
_PACES = 1024
_DEATHS = _PACES + MAX_NAMES * 8
_NAMES = _DEATHS + MAX_NAMES * 8
_STATES = _NAMES + MAX_NAMES * LABEL_SIZE
_ROWS = _STATES + MAX_SLOTS  # a multiple of 8, as all of these
_ROW_SIZE = 384
_PAGE = 0x10000  # the largest of any system; what a worker maps has to begin with one
_SLOTS = (_ROWS + MAX_SLOTS * _ROW_SIZE + _PAGE - 1) // _PAGE * _PAGE
_SLOT_SIZE = MAX_NAMES * COUNTERS_SIZE

# Words of a row. Times are CLOCK_MONOTONIC seconds; 0.0: none. The client's text takes up the rest.
_PID, _GENERATION, _SINCE, _JOB_STARTED, _JOB_NAME, _HELD = range(6)
_ROW_COUNTERS = 8
_CLIENT = 8 * (_ROW_COUNTERS + _MOST_COUNTERS)
CLIENT_SIZE = 64
RESERVATIONS = 8
"""For so many new connections a worker has places in the connection table, before it has told the master of any."""
_RESERVATIONS = (_CLIENT + CLIENT_SIZE) // 8  # the first word: a number and a serial for each

_END_OF_TIME = float(1 << 40)  # seconds

SLOW = 0.001
"""A job that is expected to take so many seconds is not done on duty (see ``duty``)."""


class State(enum.IntEnum):
    """What a worker is doing."""

    FREE = 0  # no worker in this slot
    STARTING = 1
    IDLE = 2  # on duty: waits for a connection
    RESERVE = 3  # waits to be called to duty
    SERVING = 4  # on duty: serves one
    BUSY = 5  # off duty: with something that takes long
    LEAVING = 6
    STOPPED = 7  # by a signal, not by us


_KNOWN_STATES = tuple(State)


class ScoreboardError(Exception):
    """A file is not a scoreboard that this program can read; the text says why."""


class _Word:
    """A word of the header, as an attribute of the board."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __get__(self, board: Scoreboard, owner: type[Scoreboard]) -> int:
        return board.words[self.index]

    def __set__(self, board: Scoreboard, value: int) -> None:
        board.words[self.index] = value


class _MastersWord(_Word):
    """A word that the master alone writes. What workers may have made of it, it neither believes nor leaves."""

    def __get__(self, board: Scoreboard, owner: type[Scoreboard]) -> int:
        return board.own.get(self.index, board.words[self.index])

    def __set__(self, board: Scoreboard, value: int) -> None:
        board.own[self.index] = board.words[self.index] = value


WATCHED, RETIRED, STOPPING = 4, 5, 6
"""Words of the header that workers look at for every connection that they serve."""


class Scoreboard:
    """The memory, and the numbers in it that concern everybody. Made by the master before it forks.

    ``view`` is the memory, ``words`` and ``times`` the same as numbers, ``states`` a byte for each slot.
    """

    _magic = _MastersWord(0)
    _layout = _MastersWord(1)
    _slots = _MastersWord(2)
    _names = _MastersWord(3)
    watched = _Word(WATCHED)
    """Whether the master looks after clients while no worker waits on duty: no need to ring for it."""
    retired = _MastersWord(RETIRED)
    """Workers of generations up to this number have to leave."""
    stopping = _MastersWord(STOPPING)
    """Whether the server is stopping: then connections are closed, not put back."""
    connections = _MastersWord(7)
    """How many connections are in the table, those included that a worker serves at the moment."""
    connection_limit = _MastersWord(8)
    """How many there may be."""
    pid = _MastersWord(9)
    """The master's process id."""
    generation = _MastersWord(10)
    """The number of the generation that serves; 0: none yet."""
    astray = _Word(13)
    """Whether some connections are astray (see ``table``)."""
    ended = _Word(15)
    """How many connections have left the table, ever."""
    looks = _Word(14)
    """How many more times workers shall look for them."""
    exhausted = _MastersWord(11)
    """Whether process_limit keeps the master from starting more workers: no need to ask for any."""
    _started = 12  # as a time
    back_by = _MastersWord(16)
    """Until when, in seconds of CLOCK_MONOTONIC, the master may be away since its program is being replaced."""

    def __init__(self, path: Path | None = None) -> None:
        """Make a new board, at *path* in place of what is there, or without a name. Raises OSError."""
        self._path = path
        self.own: dict[int, int] = {}
        self._taken: set[int] = set()
        new = path and path.with_name(path.name + ".new")
        self._map(_make_file(new) if new else create_memory("scoreboard", _SLOTS))
        self._layout, self._slots, self._names = LAYOUT, 0, 0
        self.retired = self.stopping = self.connections = self.connection_limit = self.generation = self.exhausted = 0
        self.back_by = 0
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
        _require_layout(os.pread(fd, _HEADER.size, 0), path)
        _require_size(fd, path)
        board._map(fd)
        board.own = {index: board.words[index] for index in _words_of_the_master()}
        board._slots, board._names = board.slots, min(max(board._names, 1), MAX_NAMES)
        board.pid, board.stopping, board.exhausted = os.getpid(), 0, 0
        board._taken = {slot for slot in range(board.slots) if board.states[slot] != State.FREE}
        return board

    @classmethod
    def read(cls, path: Path) -> Self:
        """Open the board at *path* for reading. Raises ScoreboardError, or OSError when it cannot be opened."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return cls.open(fd, path)
        finally:
            os.close(fd)

    @classmethod
    def open(cls, fd: int, path: Path | None = None) -> Self:
        """Map the board of the descriptor *fd*, as it is now, for reading. Raises ScoreboardError, or OSError."""
        board = cls.__new__(cls)
        board._path = path
        board.own = {}
        _require_layout(os.pread(fd, _HEADER.size, 0), path)
        _require_size(fd, path)
        size = min(os.fstat(fd).st_size, _SLOTS + MAX_SLOTS * _SLOT_SIZE)
        board._use(memoryview(mmap.mmap(fd, size, access=mmap.ACCESS_READ)))
        return board

    def _map(self, fd: int) -> None:
        self._fd = fd
        self._use(view(fd, _SLOTS))

    def _use(self, view: memoryview) -> None:
        self.view = view
        self.states = view[_STATES : _STATES + MAX_SLOTS]
        self.words = view[:_SLOTS].cast("Q")
        self.times = view[:_SLOTS].cast("d")
        self.paces = self.times[_PACES // 8 : _PACES // 8 + MAX_NAMES]
        self.deaths = self.words[_DEATHS // 8 : _DEATHS // 8 + MAX_NAMES]
        """By the index of a job's name: how many workers have died in such a job, or were killed for it."""

    def fileno(self) -> int:
        """Return the descriptor of the memory."""
        return self._fd

    def remove(self) -> None:
        """Remove the file, if it has a name. The memory goes with its last user."""
        if self._path:
            self._path.unlink(missing_ok=True)

    def leave_to_child(self) -> None:
        """In a worker that has mapped all that it needs: give up the master's view, and the descriptor.

        With it code of a map could cut off a file that has a name, which cannot be sealed: that would kill all who
        have mapped it.
        """
        self.own.clear()
        os.close(self._fd)

    def restore(self) -> None:
        """Undo what somebody else has made of the words that are the master's."""
        for index, value in self.own.items():
            if self.words[index] != value:
                self.words[index] = value

    def close(self) -> None:
        """Close the descriptor, and let go of the memory."""
        os.close(self._fd)
        del self.view, self.states, self.words, self.times, self.paces, self.deaths

    @property
    def started(self) -> float:
        """When the master started, in seconds since the epoch."""
        return _time(self.times[self._started])

    @property
    def slots(self) -> int:
        """How many slots have ever been used. What a worker may have written there is not believed."""
        return min(self._slots, MAX_SLOTS)

    def count(self, *states: State) -> int:
        """Return how many workers are in one of *states*."""
        used = bytes(self.states[: self.slots])
        return sum(map(used.count, states))

    def rows(self) -> list[Row]:
        """Return the rows of all slots that have ever been used."""
        return [Row(self, slot) for slot in range(self.slots)]

    def increment(self, group: str, name: str) -> None:
        """Count an event in one of the SERVER_COUNTERS. Called by the master alone: a worker's are in its row."""
        self.words[_COUNTERS + server_counter(group, name)] += 1

    def count_death(self, row: Row) -> None:
        """Count that a worker has died in the job of *row*, if it was in one. Called by the master alone."""
        if row.job_started and row.job_name < MAX_NAMES:
            self.deaths[row.job_name] += 1

    def server_counters(self) -> list[int]:
        """Return the SERVER_COUNTERS: the master's and all workers' together."""
        bases = [_COUNTERS, *(row.base + _ROW_COUNTERS for row in self.rows())]
        return [sum(self.words[base + index] for base in bases) for index in range(len(SERVER_COUNTERS))]

    def claim(self, generation: int) -> Row:
        """Take the first free slot for a new worker. Called by the master alone. Raises OSError: no room."""
        slot = next(slot for slot in range(MAX_SLOTS + 1) if slot not in self._taken)
        self._make_room(slot)
        self._slots = max(self._slots, slot + 1)
        self.take(slot)
        row = Row(self, slot)
        row.begin(generation)
        return row

    def take(self, slot: int) -> None:
        """Note that a worker has *slot*. Called by the master alone."""
        self._taken.add(slot)

    def release(self, slot: int) -> None:
        """Let another worker have *slot*. Called by the master alone."""
        self._taken.discard(slot)

    def _make_room(self, slot: int) -> None:
        """Let the file reach to the end of *slot*, and reserve what the worker in it will write.

        A store into a file on a disk that is full would kill it (SIGBUS).
        """
        if slot >= MAX_SLOTS:
            raise OSError(f"all {MAX_SLOTS} slots are taken")
        begin = _SLOTS + slot * _SLOT_SIZE
        os.ftruncate(self._fd, max(os.fstat(self._fd).st_size, begin + _SLOT_SIZE))
        _reserve(self._fd, _ROWS + slot * _ROW_SIZE, _ROW_SIZE, self._path)
        _reserve(self._fd, begin, self._names * COUNTERS_SIZE, self._path)

    # Counters of jobs.

    def learn(self, names: Iterable[str]) -> None:
        """Give each of *names* that has none yet counters, in workers that are forked from now on.

        Called by the master alone. A name keeps its place for good; when MAX_NAMES have one the rest gets none.
        """
        known = self.labels()
        for new in dict.fromkeys(map(label, names)):
            if new not in known and self._names < MAX_NAMES:
                begin = _NAMES + self._names * LABEL_SIZE
                self.view[begin : begin + len(new)] = new
                self._names += 1

    def labels(self) -> list[bytes]:
        """Return the names that have counters, by their index, as they are stored."""
        names = bytes(self.view[_NAMES : _NAMES + min(self._names, MAX_NAMES) * LABEL_SIZE])
        return [names[begin : begin + LABEL_SIZE].rstrip(b"\0") for begin in range(0, len(names), LABEL_SIZE)]

    def names(self) -> list[str]:
        """Return the names that have counters, by their index."""
        return [name.decode("utf-8", "replace") for name in self.labels()]

    def name(self, index: int) -> str:
        """Return the name with *index*, which may be any number: a worker has written it."""
        names = self.names()
        return names[index] if index < len(names) else OTHER

    def open_counters(self, slot: int, labels: Sequence[bytes]) -> SlotCounters:
        """Map the counters of *slot*, to be written by the worker in it; *labels*: the names that it knows."""
        mapped = view(self._fd, len(labels) * COUNTERS_SIZE, _SLOTS + slot * _SLOT_SIZE)
        return SlotCounters(labels, mapped, self.paces)

    def counters(self, slot: int) -> SlotCounters:
        """Return the counters of *slot* on a board that was opened for reading; none if it was not there then."""
        begin = _SLOTS + slot * _SLOT_SIZE
        room = max(len(self.view) - begin, 0) // COUNTERS_SIZE
        return SlotCounters(self.labels()[:room], self.view[begin:], self.paces)


def _words_of_the_master() -> list[int]:
    return [each.index for each in vars(Scoreboard).values() if isinstance(each, _MastersWord)]


def _make_file(path: Path) -> int:
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        undo.callback(path.unlink)
        os.fchmod(fd, 0o644)  # whatever the umask: everybody may read it
        _reserve(fd, 0, _ROWS, path)
        os.ftruncate(fd, _SLOTS)
        undo.pop_all()
    return fd


def _reserve(fd: int, begin: int, size: int, path: Path | None) -> None:
    try:
        os.posix_fallocate(fd, begin, size)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path or "scoreboard")) from error


def _require_layout(header: bytes, path: Path | None) -> None:
    if len(header) < _HEADER.size:
        raise ScoreboardError(f"{path}: not a scoreboard, or cut short: it has {len(header)} bytes")
    magic, layout = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise ScoreboardError(f"{path}: not a scoreboard")
    if layout != LAYOUT:
        raise ScoreboardError(
            f"{path}: a scoreboard with layout {layout:08x}, of another version of the program; "
            f"this one reads layout {LAYOUT:08x}"
        )


def _require_size(fd: int, path: Path | None) -> None:
    size = os.fstat(fd).st_size
    if size < _SLOTS:
        raise ScoreboardError(f"{path}: not a scoreboard, or cut short: it has {size} bytes, of {_SLOTS} at least")


class Row:
    """One worker's row. The worker writes it; the master writes it only before the fork and after the end."""

    def __init__(self, board: Scoreboard, slot: int) -> None:
        self.slot = slot
        self.base = (_ROWS + slot * _ROW_SIZE) // 8
        self._board = board
        self._words = board.words
        self._times = board.times

    def begin(self, generation: int) -> None:
        """Start a new life in this slot. The counters go on."""
        self._words[self.base + _GENERATION] = generation
        self._clear()
        self.set_state(State.STARTING)

    def end(self) -> None:
        """Free the slot."""
        self._words[self.base + _PID] = 0
        self._clear()
        self.set_state(State.FREE)
        self._board.release(self.slot)

    def _clear(self) -> None:
        self._times[self.base + _JOB_STARTED] = 0.0
        self.held = 0

    @property
    def generation(self) -> int:
        """The number of the worker's generation."""
        return self._words[self.base + _GENERATION]

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._words[self.base + _PID]

    @pid.setter
    def pid(self, value: int) -> None:
        self._words[self.base + _PID] = value

    @property
    def state(self) -> State:
        """What the worker is doing."""
        value = self._board.states[self.slot]
        return _KNOWN_STATES[value] if value < len(_KNOWN_STATES) else State.BUSY

    def set_state(self, state: State) -> None:
        """Enter *state*, now."""
        self._times[self.base + _SINCE] = monotonic()
        self._board.states[self.slot] = state

    @property
    def since(self) -> float:
        """When the worker entered its state, or served a connection last."""
        return _time(self._times[self.base + _SINCE])

    @property
    def is_damaged(self) -> bool:
        """Whether something stands in it that no worker of ours writes."""
        times = [self._times[self.base + index] for index in (_SINCE, _JOB_STARTED)]
        latest = monotonic() + 1.0  # not before, and with a second's grace: the worker goes on meanwhile
        return self._board.states[self.slot] >= len(_KNOWN_STATES) or not all(0.0 <= time <= latest for time in times)

    @property
    def held(self) -> int:
        """The number of the connection that the worker has taken out of the table; 0: of none."""
        return self._words[self.base + _HELD]

    @held.setter
    def held(self, value: int) -> None:
        self._words[self.base + _HELD] = value

    def reservations(self) -> list[tuple[int, int]]:
        """Return numbers and serials of the places that are reserved; number 0: none."""
        begin = self.base + _RESERVATIONS
        words = self._words[begin : begin + 2 * RESERVATIONS].tolist()
        return list(zip(words[::2], words[1::2], strict=True))

    def set_reservation(self, index: int, number: int, serial: int) -> None:
        """Reserve a place. The serial first: a worker looks at the number."""
        at = self.base + _RESERVATIONS + 2 * index
        self._words[at + 1] = serial
        self._words[at] = number

    def take_reservation(self) -> tuple[int, int] | None:
        """Take a place that is reserved, if there is one: number and serial. Called by the worker."""
        for index, (number, serial) in enumerate(self.reservations()):
            if number:
                self.set_reservation(index, 0, 0)
                return number, serial
        return None

    def clear_reservations(self) -> None:
        """Take back all places."""
        for index in range(RESERVATIONS):
            self.set_reservation(index, 0, 0)

    @property
    def job_started(self) -> float:
        """When the job under way began; 0.0 when there is none."""
        return _time(self._times[self.base + _JOB_STARTED])

    @property
    def job_name(self) -> int:
        """What the latest job is for: the index of its name."""
        return self._words[self.base + _JOB_NAME]

    @property
    def client(self) -> str:
        """The client that is served, or was served last."""
        begin = self.base * 8 + _CLIENT
        return bytes(self._board.view[begin : begin + CLIENT_SIZE]).rstrip(b"\0").decode("ascii", "replace")

    def cells(self) -> Cells:
        """Return the cells that a worker writes for each connection that it serves."""
        begin = self.base * 8 + _CLIENT
        return Cells(
            self._times[self.base + _SINCE : self.base + _SINCE + 1],
            self._words[self.base + _HELD : self.base + _HELD + 1],
            self._board.view[begin : begin + CLIENT_SIZE],
        )

    def job_cells(self) -> tuple[memoryview[int], memoryview[float]]:
        """Return the cells for the index of a job's name, and for when it began."""
        name, started = self.base + _JOB_NAME, self.base + _JOB_STARTED
        return self._words[name : name + 1], self._times[started : started + 1]

    def increment(self, group: str, name: str) -> None:
        """Count an event in one of the SERVER_COUNTERS."""
        self._words[self.base + _ROW_COUNTERS + server_counter(group, name)] += 1


def _time(value: float) -> float:
    """Return a time that a worker may have written; 0.0, as if there were none, when it is none."""
    return value if 0.0 <= value < _END_OF_TIME else 0.0


class Cells:
    """Cells of a row, by themselves: to find them in it again for each connection would cost too much."""

    __slots__ = ("client", "held", "since")

    def __init__(self, since: memoryview[float], held: memoryview[int], client: memoryview[int]) -> None:
        self.since = since
        self.held = held
        self.client = client


def client_label(client: str) -> bytes:
    """Return *client* as it is stored in a row."""
    return client.encode("ascii", "replace")[:CLIENT_SIZE].ljust(CLIENT_SIZE, b"\0")


def layout_of(names: Mapping[str, object]) -> int:
    """Return the number of the layout that *names*, those of this module, describe."""
    board, counted = vars(names["Scoreboard"]), names["SERVER_COUNTERS"]
    words = sorted((name, each.index) for name, each in board.items() if isinstance(each, _Word))
    events = [(each.group, each.name) for each in counted]  # type: ignore[attr-defined]
    states = [(each.name, each.value) for each in State]
    return fingerprint(constants(names), constants(vars(counters)), words, board["_started"], events, states)


LAYOUT = layout_of(globals())
"""Of everything that is stored here. A program reads only what one with the same layout has written."""
