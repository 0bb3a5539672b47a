"""What the workers of a server share about the backends of its maps: health, connections, who is held by lookups.

Two pieces of memory, both made by the master before the first fork, so that they outlive workers, reloads and
upgrades. The *board* is what ``status`` shows; everybody may read its file. What is *private* has no name, so that
nobody but the workers can open it: there stand the digests of backends, which a password is part of, and it is what
locks are taken on.

Whatever must not outlive a process is a record lock of fcntl(2), which the kernel takes back when the process ends,
however it ends: the right to a connection, the turn to try whether a backend is up, that a worker lives. Each stands
for a byte far behind the end of the memory.

A worker may write anything into both. The master reads neither. Others take what cannot be as nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
import signal
import struct
from collections.abc import Hashable, Iterator, MutableSequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic, sleep
from types import FrameType
from typing import TYPE_CHECKING, Self

from prefork_socketmap.daemon import newfile, recordlock
from prefork_socketmap.prefork.shared import create_memory, view
from prefork_socketmap.socketmap.messages import printable

log = logging.getLogger("prefork_socketmap.worker")

if TYPE_CHECKING:
    from prefork_socketmap.maps.backend import Cells, Links, Standing

LAYOUT = 1
_MAGIC = int.from_bytes(b"preforkb", "big")
_HEADER = struct.Struct("@QQ")  # magic, layout

MAX_BACKENDS = 64
MAX_SLOTS = 512
_MAX_WORKERS = 24576
_MAX_PID = 1 << 22  # proc(5), pid_max

# The board: a page for the header and one for each backend.
_PAGE = 4096
_LABEL, _LABEL_SIZE = 512, 256
_USER_PIDS, _USER_SAMPLE = 1024, 64  # of workers whose maps ask it: some, to tell whether there are any
_PIDS = 2048  # of those who have a connection, by slot
_BOARD_SIZE = _PAGE * (1 + MAX_BACKENDS)
# Times at the beginning of a backend's page.
_TROUBLE, _SINCE, _RETRY, _PAUSE, _SUSPECT, _LEAVE, _LIMIT = range(7)

# What is private: digests, and for each backend times of each slot, and a time and a byte for each worker.
_DIGEST_SIZE = 32
_DIGESTS = _PAGE
_BACKENDS = 2 * _PAGE
_TIMES = 8 * MAX_SLOTS
_USED, _OPENED, _WANTED, _WAITING = 0, _TIMES, 2 * _TIMES, 3 * _TIMES
_HELD = _WAITING + 8 * _MAX_WORKERS
_BACKEND_SIZE = _HELD + _MAX_WORKERS
_LACKING = _BACKENDS + MAX_BACKENDS * _BACKEND_SIZE  # a byte for each worker
_PRIVATE_SIZE = _LACKING + _MAX_WORKERS

# Bytes that locks stand for.
_LOCKS = 1 << 40
_ALLOCATION = _LOCKS - 1
_OF_A_BACKEND = 1 << 20
_USERS, _TURN, _SLOTS = 0, 1, 2
_WORKERS = _LOCKS + MAX_BACKENDS * _OF_A_BACKEND

_SECOND = 1.0
"""A slot is used for one connection in so long, so that all of them are no storm."""
_PATIENCE = 0.1  # how long somebody who was asked for a connection has to answer, before others are asked
_BREATH = 0.01  # so long a server may take to notice that a connection has been closed, before there is another one
_COURTESY = 0.05  # how long a free slot is left to those who have waited longer
_LOOK_FIRST, _LOOK_LATER = 0.002, 0.02  # how often the first one who waits looks for a slot, and how often the rest
_ROUND = 0.003  # a call that comes back within this time has found nobody else
_LOOK = 0.1  # how often it is looked whether those who hold workers are still alive
_ATTEMPTS, _MOMENT = 200, 0.005  # to register a backend, while others do so, and how long between two

DESCRIPTORS = ("backends", "backends_private")
"""Names under which an upgrade hands the two on."""


@dataclass
class Memory:
    """The two pieces of memory, by their descriptors. The board is mapped before the fork, for all."""

    board: int
    private: int
    path: Path | None
    mapped: memoryview
    worker: WorkerBackends | None = None
    """In a worker: what it has of it."""

    @classmethod
    def make(cls, path: Path | None = None) -> Self:
        """Make them; the board at *path*, in place of what is there, or without a name. Raises OSError."""
        header = _HEADER.pack(_MAGIC, LAYOUT)
        private = create_memory("backends", _PRIVATE_SIZE)
        os.pwrite(private, header, 0)
        if path is None:
            board = create_memory("backends", _BOARD_SIZE)
            os.pwrite(board, header, 0)
            return cls(board, private, None, view(board, _BOARD_SIZE))
        with newfile.in_place_of(path) as board:
            os.posix_fallocate(board, 0, _BOARD_SIZE)  # a store where the disk has no room would kill a worker
            os.pwrite(board, header, 0)
        return cls(board, private, path, view(board, _BOARD_SIZE))

    @classmethod
    def resume(cls, path: Path | None, board: int, private: int) -> Self | None:
        """Go on with those of the program that was here before; None if it had others."""
        for fd, size in ((board, _BOARD_SIZE), (private, _PRIVATE_SIZE)):
            if os.pread(fd, _HEADER.size, 0) != _HEADER.pack(_MAGIC, LAYOUT) or os.fstat(fd).st_size < size:
                return None
        return cls(board, private, path, view(board, _BOARD_SIZE))

    def descriptors(self) -> dict[str, int]:
        """Return the descriptors, for an upgrade."""
        return dict(zip(DESCRIPTORS, (self.board, self.private), strict=True))

    def leave_to_worker(self, workers: int) -> WorkerBackends:
        """In a worker, one of so many that there may be: return what it has, and give up the board's descriptor.

        A file that has a name cannot be sealed: code of a map could cut it off, which would kill all who have it.
        """
        os.close(self.board)
        self.worker = WorkerBackends(self, workers)
        return self.worker

    def defers(self, reserve: int) -> bool:
        """In one of *reserve* workers that wait to be called: whether to leave a call to another one."""
        return self.worker is not None and self.worker.defers(reserve)

    def remove(self) -> None:
        """Remove the file, if it has a name. The memory goes with its last user."""
        if self.path:
            self.path.unlink(missing_ok=True)


# For workers.


class WorkerBackends:
    """What a worker has of it. Nothing more is mapped, nor any lock taken, before a map asks a backend."""

    def __init__(self, memory: Memory, workers: int) -> None:
        """*workers* is the most workers that there may be."""
        self._memory = memory
        self.workers = workers
        self._alarm: Alarm | None = None
        self._rows: set[int] = set()
        self._lacks = False
        self._deferred = 0.0

    @cached_property
    def links(self) -> Links:
        """The connections of this process."""
        from prefork_socketmap.maps.backend import Links

        links = Links(self)

        def look(_number: int, _frame: FrameType | None) -> None:
            try:
                links.look()
            except Exception:  # in the middle of anything else, whose trouble it is not
                log.exception("connections that are not used cannot be closed")

        # Of all signals the one that, sent to a wrong process, is ignored. It must interrupt system calls: only then
        # does Python call the handler, and it takes them up again (PEP 475).
        signal.signal(signal.SIGURG, look)
        return links

    def set_alarm(self, seconds: float) -> None:
        """Send this process SIGURG after so many seconds."""
        # Where there is none, connections are closed when others want them, and with the worker.
        with contextlib.suppress(OSError, AttributeError):
            self._alarm = self._alarm or Alarm()
            self._alarm.set(seconds)

    def standing(self, identity: Hashable, label: str) -> Standing:
        """Return the standing of a backend; one of this process alone when there is no room for more."""
        import hashlib  # not above: without a backend nobody needs OpenSSL, which it loads

        row = self._registered(hashlib.sha256(repr(identity).encode("utf-8", "surrogateescape")).digest(), label)
        if row is None:
            from prefork_socketmap.maps.backend import Private

            log.warning("there are more than %d backends: [%s] has no limit of connections", MAX_BACKENDS, label)
            return Private()
        self._rows.add(row)
        begin = _PAGE * (1 + row) + _USER_PIDS
        self.board[begin : begin + 4 * _USER_SAMPLE].cast("I")[self.number % _USER_SAMPLE] = os.getpid()
        return SharedStanding(self, row)

    @property
    def board(self) -> memoryview:
        """The board."""
        return self._memory.mapped

    @cached_property
    def private(self) -> memoryview:
        """What is private."""
        return view(self._memory.private, _PRIVATE_SIZE)

    @cached_property
    def locks(self) -> Locks:
        """The locks."""
        return Locks(self._memory.private)

    @cached_property
    def span(self) -> int:
        """How many bytes of each backend are for workers: more than there are at a time."""
        return min(2 * self.workers + 64, _MAX_WORKERS)

    @cached_property
    def number(self) -> int:
        """A number that no other worker has, for as long as this one lives."""
        begin = os.getpid()
        for offset in range(self.span):
            number = (begin + offset) % self.span
            if self.locks.take(_WORKERS + number):
                break
        self.private[_LACKING + number] = 0
        # If all are taken, by more workers than there may be, the last one.
        for row in range(MAX_BACKENDS):
            if self._digest(row) != bytes(_DIGEST_SIZE):
                begin = _BACKENDS + row * _BACKEND_SIZE
                # Of one who had the number before, and was killed.
                self.private[begin + _HELD + number] = 0
                begin += _WAITING + 8 * number
                self.private[begin : begin + 8] = bytes(8)
        return number

    def note_lack(self, lacks: bool) -> None:
        """Note whether this process has been left without a connection that others of its kind have."""
        if lacks is not self._lacks:
            self._lacks = lacks
            self.private[_LACKING + self.number] = lacks

    def defers(self, reserve: int) -> bool:
        """Whether, of *reserve* workers that wait, another one has what this one lacks.

        Where there are more workers than connections, those who have one shall do the work: otherwise connections
        would go round among them as the calls do, and most of the time be closed and opened.
        """
        if not self._lacks:
            return False
        # Not all of those who lack it wait, and some may have been killed: so there is one, if there seems to be. But
        # it may have been stopped, and then the call comes back at once.
        before, self._deferred = self._deferred, monotonic()
        comes_back = self._deferred < before + _ROUND
        return not comes_back and reserve > self.private[_LACKING : _LACKING + self.span].tobytes().count(1)

    def is_alive(self, number: int) -> bool:
        """Whether there is a worker with *number*."""
        return number == self.number or self.locks.holder(_WORKERS + number) is not None

    def _registered(self, digest: bytes, label: str) -> int | None:
        """Return the row of a backend, which is new perhaps; None when there is none to be had."""
        row = self._find(digest)
        if row is not None:
            return row
        for attempt in range(_ATTEMPTS):
            if attempt:
                sleep(_MOMENT)
            if self.locks.take(_ALLOCATION):
                try:
                    row = self._find(digest)
                    return self._allocate(digest, label) if row is None else row
                finally:
                    self.locks.free(_ALLOCATION)
        return None

    def _digest(self, row: int) -> bytes:
        begin = _DIGESTS + row * _DIGEST_SIZE
        return bytes(self.private[begin : begin + _DIGEST_SIZE])

    def _find(self, digest: bytes) -> int | None:
        row = next((row for row in range(MAX_BACKENDS) if self._digest(row) == digest), None)
        # As long as anybody has this lock, which many can share, the row stays what it is.
        if row is None or not self.locks.take(_lock(row, _USERS), shared=True) or self._digest(row) != digest:
            return None
        return row

    def _allocate(self, digest: bytes, label: str) -> int | None:
        """Take a row that no worker has, one that nobody ever had if there is one. The caller holds the lock."""
        for row in sorted(range(MAX_BACKENDS), key=lambda row: self._digest(row) != bytes(_DIGEST_SIZE)):
            # A lock of its own a process can always change.
            if row not in self._rows and self.locks.take(_lock(row, _USERS)):
                begin = _PAGE * (1 + row)
                self.board[begin : begin + _PAGE] = bytes(_PAGE)
                name = label.encode("utf-8", "replace")[: _LABEL_SIZE - 1]
                self.board[begin + _LABEL : begin + _LABEL + len(name)] = name
                begin = _BACKENDS + row * _BACKEND_SIZE
                # No more than is used: what nobody touches takes no room.
                for place, size in ((0, _WAITING), (_WAITING, 8 * self.span), (_HELD, self.span)):
                    self.private[begin + place : begin + place + size] = bytes(size)
                begin = _DIGESTS + row * _DIGEST_SIZE
                self.private[begin : begin + _DIGEST_SIZE] = digest
                self.locks.take(_lock(row, _USERS), shared=True)
                return row
        return None


class SharedStanding:
    """The standing of a backend (see ``maps.backend.Standing``) in shared memory."""

    cells: Cells

    def __init__(self, worker: WorkerBackends, row: int) -> None:
        from prefork_socketmap.maps.backend import Cells

        self._worker = worker
        self._locks = worker.locks
        self._row = row
        begin = _PAGE * (1 + row)
        page = worker.board[begin : begin + _PAGE]
        times = page.cast("d")
        names = {"trouble": _TROUBLE, "since": _SINCE, "retry": _RETRY, "pause": _PAUSE, "suspect": _SUSPECT}
        names |= {"leave": _LEAVE, "limit": _LIMIT}
        self.cells = Cells(**{name: times[index : index + 1] for name, index in names.items()})  # type: ignore[arg-type]
        self.pids = page[_PIDS : _PIDS + 4 * MAX_SLOTS].cast("I")
        begin = _BACKENDS + row * _BACKEND_SIZE
        private = worker.private[begin : begin + _BACKEND_SIZE]
        self.used, self.opened, self.wanted = (
            private[at : at + _TIMES].cast("d") for at in (_USED, _OPENED, _WANTED)
        )
        self._number = worker.number
        self._held = private[_HELD : _HELD + worker.span]
        self._waiting = private[_WAITING : _WAITING + 8 * worker.span].cast("d")
        self._waits_since = 0.0
        self._left_to_others: dict[int, float] = {}
        self._own: set[int] = set()
        self._next_look = 0.0
        self._next_request = 0.0

    def take_turn(self) -> bool:
        """Become the one who tries whether the backend is up."""
        return self._locks.take(_lock(self._row, _TURN))

    def end_turn(self) -> None:
        """Let another process be that."""
        self._locks.free(_lock(self._row, _TURN))

    def enter(self, share: float) -> bool:
        """Count this process among those with a lookup there, if they are not too many."""
        held = self._held
        held[self._number] = 1
        most = share * self._worker.workers
        number = held.tobytes().count(1)
        if number <= most or number == 1:
            return True
        self._forget_the_dead()
        if held.tobytes().count(1) <= max(most, 1):
            return True
        held[self._number] = 0
        return False

    def leave(self) -> None:
        """End that."""
        self._held[self._number] = 0
        if self._waits_since:
            self._waits_since = self._waiting[self._number] = 0.0
            self._left_to_others.clear()

    def _forget_the_dead(self) -> None:
        now = monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK
        for number, (byte, since) in enumerate(zip(self._held.tobytes(), self._waiting.tolist(), strict=True)):
            if (byte or since) and not self._worker.is_alive(number):
                self._held[number] = 0
                self._waiting[number] = 0.0

    def take_slot(self, most: int) -> SharedSlot | None:
        """Return the right to one of *most* connections; None: not now."""
        now = monotonic()
        is_polite = self._earlier(now) >= max(self.pids[:most].tolist().count(0), 1)
        for index in range(most):
            # The lock of a slot that this process has would be given to it again.
            if index in self._own or _is_recent(self.opened[index], now):
                continue
            if not self._locks.take(_lock(self._row, _SLOTS + index)):
                self._left_to_others.pop(index, None)
                continue
            # Not if another one has had it in between.
            if not (self._is_resting(index, now) or (is_polite and self._leaves_to_others(index, now))):
                return self._slot(index, now)
            self._locks.free(_lock(self._row, _SLOTS + index))
        return None

    def _is_resting(self, index: int, now: float) -> bool:
        """Whether a slot that is free shall not be used at this moment."""
        return _is_recent(self.opened[index], now) or now - _BREATH < self.used[index] <= now

    def _slot(self, index: int, now: float) -> SharedSlot:
        self._worker.note_lack(False)
        self._own.add(index)
        self.opened[index] = self.used[index] = now
        self.wanted[index] = 0.0
        self.pids[index] = os.getpid()
        return SharedSlot(self, index)

    def _earlier(self, now: float) -> int:
        """Return how many wait for a slot since before this process does."""
        mine = self._waits_since or now
        return sum(0.0 < since < mine for since in self._waiting.tolist())

    def _leaves_to_others(self, index: int, now: float) -> bool:
        """Whether a free slot is left to those who came earlier: for a moment, since they may have been stopped."""
        return now < self._left_to_others.setdefault(index, now) + _COURTESY

    def free_slot(self, index: int) -> None:
        """Let another process have the slot *index*, whose connection has been closed."""
        self.used[index] = monotonic()
        self.pids[index] = 0
        self._own.discard(index)
        self._locks.free(_lock(self._row, _SLOTS + index))

    def note_lack(self) -> None:
        """Note that this process has given up its connection for another one."""
        self._worker.note_lack(True)

    def serves_others(self) -> bool:
        """Whether other processes have connections there, and used one just now."""
        now = monotonic()
        has_used = ((index, pid) for index, pid in enumerate(self.pids) if pid and index not in self._own)
        return any(_is_recent(self.used[index], now) and _exists(pid) for index, pid in has_used)

    def ask_for_slot(self, most: int) -> float:
        """Ask the process whose connection has not been used for longest to give it up.

        Return how long to wait before the next look, in seconds.
        """
        now = monotonic()
        if not self._waits_since:
            self._worker.note_lack(True)
            self._waits_since = self._waiting[self._number] = now
        if now >= self._next_request:
            self._next_request = now + _PATIENCE
            self._forget_the_dead()
            self._ask_the_idlest(most, now)
        return _LOOK_LATER if self._earlier(now) else _LOOK_FIRST

    def _ask_the_idlest(self, most: int, now: float) -> None:
        candidates = (
            index
            for index in range(most)
            if index not in self._own
            and not _is_recent(self.opened[index], now)
            and not 0.0 <= now - self.wanted[index] <= _PATIENCE
        )
        for index in sorted(candidates, key=self.used.__getitem__):
            if self._ask(index, now):
                return

    def _ask(self, index: int, now: float) -> bool:
        """Ask the process that has the slot *index*, if there is one."""
        lock = _lock(self._row, _SLOTS + index)
        pid = self._locks.holder(lock)  # the kernel says so: what stands in memory may be a stranger's
        if pid is None:
            return True  # it is free by now
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                if self._locks.holder(lock) == pid:
                    self.wanted[index] = now
                    signal.pidfd_send_signal(pidfd, signal.SIGURG)
                    return True
            finally:
                os.close(pidfd)
        return False


class SharedSlot:
    """The right to a connection (see ``maps.backend.Slot``)."""

    def __init__(self, standing: SharedStanding, index: int) -> None:
        self._standing = standing
        self._index = index
        self.used: MutableSequence[float] = standing.used[index : index + 1]  # type: ignore[assignment]

    def is_wanted(self) -> bool:
        """Whether another process waits for it."""
        return self._standing.wanted[self._index] != 0.0

    def free(self) -> None:
        """Let another process have it."""
        if self.is_wanted():
            self._standing.note_lack()
        self._standing.free_slot(self._index)


class Locks:
    """Record locks on *fd*, each of a byte. They belong to the process, and end with it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def take(self, place: int, *, shared: bool = False) -> bool:
        """Take a lock, or change the one that this process has; return whether it has it. Never blocks."""
        try:
            fcntl.lockf(self._fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, 1, place)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.ENOLCK):
                return False
            raise
        return True

    def free(self, place: int) -> None:
        """Give a lock back."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, place)

    def holder(self, place: int) -> int | None:
        """Return the pid of another process that has the lock; None: none has."""
        return recordlock.holder(self._fd, place, 1)


def _lock(row: int, which: int) -> int:
    return _LOCKS + row * _OF_A_BACKEND + which


def _is_recent(moment: float, now: float) -> bool:
    return now - _SECOND < moment <= now


class Alarm:
    """Sends SIGURG to this process when its time has come: timer_create(2), which no code of a map will be using.

    SIGALRM and setitimer(2) belong to that.
    """

    def __init__(self) -> None:
        """Raises OSError."""
        # sigevent(7): sigev_value, sigev_signo, sigev_notify (0: SIGEV_SIGNAL), padding up to 64 bytes.
        event = struct.pack("@Pii", 0, signal.SIGURG, 0).ljust(64, b"\0")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = ctypes.c_void_p()
        if self._libc.timer_create(1, event, ctypes.byref(self._timer)):  # 1: CLOCK_MONOTONIC
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def set(self, seconds: float) -> None:
        """Ring once, after so many seconds."""
        whole = int(seconds)
        # itimerspec: the interval, then the time until it rings for the first time.
        when = struct.pack("@qqqq", 0, 0, whole, int((seconds - whole) * 1e9))
        self._libc.timer_settime(self._timer, 0, when, None)


# For those who look at it from outside.


@dataclass(frozen=True)
class BackendReport:
    """A backend at one moment."""

    name: str
    connections: int
    """How many are open now, all workers together."""
    down_seconds: float | None
    """For how long it has been down; None: it is up."""

    @property
    def is_up(self) -> bool:
        """Whether lookups are sent there."""
        return self.down_seconds is None


def read(path: Path) -> list[BackendReport]:
    """Return all backends on the board at *path*; none if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return read_open(fd)
    finally:
        os.close(fd)


def read_open(fd: int) -> list[BackendReport]:
    """Return all backends on the board that is open as *fd*; none if it is no board."""
    if os.pread(fd, _HEADER.size, 0) != _HEADER.pack(_MAGIC, LAYOUT) or os.fstat(fd).st_size < _BOARD_SIZE:
        return []
    board = memoryview(mmap.mmap(fd, _BOARD_SIZE, access=mmap.ACCESS_READ)).tobytes()
    return sorted(_reports(board), key=lambda each: each.name)


def _reports(board: bytes) -> Iterator[BackendReport]:
    now = monotonic()
    for row in range(MAX_BACKENDS):
        page = memoryview(board)[_PAGE * (1 + row) : _PAGE * (2 + row)]
        name = bytes(page[_LABEL : _LABEL + _LABEL_SIZE]).partition(b"\0")[0].decode("utf-8", "replace")
        if name and any(map(_exists, page[_USER_PIDS : _USER_PIDS + 4 * _USER_SAMPLE].cast("I"))):
            since = page.cast("d")[_SINCE]
            pids = page[_PIDS : _PIDS + 4 * MAX_SLOTS].cast("I")
            yield BackendReport(
                printable(name),
                sum(map(_exists, pids)),
                now - since if 0.0 < since <= now else None,
            )


def _exists(pid: int) -> bool:
    """Whether there is a process; a service manager may have hidden it in /proc, where workers let nobody look."""
    if not 0 < pid <= _MAX_PID:
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True
