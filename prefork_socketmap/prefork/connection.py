"""One connection in the hands of a worker, for one turn: nothing here waits.

A turn takes what has arrived, answers the requests in it that are complete, and leaves. What it cannot finish (a
request whose rest has not arrived, more requests than one turn answers, a reply that the client does not read) is
*kept*: it goes to the connection table, where it waits without a worker.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import logging
import socket
import struct
import termios
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from prefork_socketmap.prefork.counters import JobCounters
from prefork_socketmap.prefork.scoreboard import SLOW, client_label
from prefork_socketmap.prefork.table import EVENTS, Buffers, ConnectionTable, Stage

# A request with an address fits, and so does the bytes object in what the interpreter allocates without malloc(3).
_REQUEST_SIZE = 476
_READ_SIZE = 65536
_WRITE_SIZE = 1 << 18  # of a reply that the client reads slowly
_NOW = socket.MSG_DONTWAIT
_SEND_NOW = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_TURN_REQUESTS = 64
_TURN_SECONDS = 0.005
_TURN_READS = 8  # of the rest of one request
# So long, in seconds, and so many bytes long a client is listened to after the last reply.
_LAST_WORDS, _MOST_LAST_WORDS = 1.0, 1 << 20
_UNSPECIFIED = struct.pack("=H14x", socket.AF_UNSPEC)
_libc = ctypes.CDLL(None)
_ORDERLY_CLOSE = struct.pack("@ii", 0, 0)


REASONS = {
    "refused": (logging.WARNING, "[%s]: connection refused: max_connections, or the limit of open files, is reached"),
    "evicted": (
        logging.WARNING,
        "[%s]: idle connection closed to make room for a new one: max_connections is reached",
    ),
    "expired": (logging.INFO, "[%s]: silent connection closed after keepalive_timeout"),
    "timed_out": (logging.WARNING, "[%s]: connection closed after read_timeout or write_timeout"),
    "overflowed": (logging.WARNING, "[%s]: connection closed: too many bytes wait for slow clients"),
}
"""What is told of a connection that is ended for a limit, by the server's counter of that: level, and text."""


class Timeouts(Protocol):
    """What bounds the waiting, in seconds; 0: nothing does."""

    @property
    def read_timeout(self) -> float: ...  # noqa: D102
    @property
    def write_timeout(self) -> float: ...  # noqa: D102


class Job:
    """The job that a worker is doing, as it notes it in shared memory: there the master sees which takes too long.

    What lies between ``begin`` and ``end`` may be interrupted. ``left`` is how many more may begin before the worker
    has to leave. ``ended`` is when the last one did, ``seconds`` how long it took.
    """

    __slots__ = ("_before_long", "_name", "_started", "ended", "left", "seconds")

    def __init__(
        self, cells: tuple[memoryview[int], memoryview[float]], left: float, before_long: Callable[[], None]
    ) -> None:
        """*cells*: for the index of the job's name and for when it began (0.0: no job). *before_long* is called
        before a job that will probably take long."""
        self._name, self._started = cells
        self._before_long = before_long
        self.left = left
        self.seconds = 0.0
        self.ended = 0.0

    def begin(self, counters: JobCounters) -> None:
        """Begin a job that *counters* are for."""
        self.left -= 1
        self._name[0] = counters.index
        self._started[0] = monotonic()
        if counters.pace[0] > SLOW:
            self._before_long()

    def end(self) -> float:
        """End the job; return how many seconds it took. Once more does no harm: an interruption may leave open
        whether it has ended."""
        started = self._started[0]
        if started:
            self._started[0] = 0.0
            self.ended = ended = monotonic()
            self.seconds = ended - started
        return self.seconds


Handler = Callable[["Connection"], None]
"""Serves one turn: receives, answers what is complete, and keeps the rest. It waits for nothing but its jobs."""


class Connection:
    """A connection, as a worker knows it.

    ``number`` and ``serial`` say where it stands in the table; number 0: not there (yet). ``has_ended`` says that
    there is nothing more to do but to close it.
    """

    __slots__ = (
        "_begun",
        "_index",
        "_left",
        "_limits",
        "_modify",
        "_recv",
        "_send",
        "_since",
        "_stages",
        "_table",
        "client",
        "deadline",
        "excess",
        "has_ended",
        "input",
        "job",
        "label",
        "missing",
        "number",
        "output",
        "serial",
        "sock",
        "stage",
    )

    def __init__(self, sock: socket.socket, table: ConnectionTable, limits: Timeouts, job: Job) -> None:
        if sock.gettimeout() is not None:
            sock.settimeout(None)  # a default that the program has set, for the sake of its databases perhaps
        self.job = job
        self.has_ended = False
        self.excess = ""
        """Which of the server's counters of connections tells why it was ended, if it was for a limit."""
        self._table = table
        self._stages = table.stages
        self._since = table.since
        self._modify = table.modify
        self._limits = limits
        self.client = client_of(sock)
        """The peer's IP address, or ``"local"`` for a Unix socket."""
        self.label = client_label(self.client)
        """The same as the scoreboard shows it."""
        self._forget()
        self.settle(0, 0, sock)

    def _forget(self) -> None:
        self.stage = Stage.REQUEST
        self.input = self.output = b""
        self.missing = 0
        self.deadline = 0.0

    def settle(self, number: int, serial: int, sock: socket.socket) -> None:
        """Note where in the table it stands, and with which descriptor it goes on."""
        self.number, self.serial = number, serial
        self._index = number - self._table.first
        self.sock = sock
        self._recv = sock.recv
        self._send = sock.send

    # What a handler calls.

    def receive(self) -> bytes:
        """Return what has arrived, behind what was kept of it; nothing when there is nothing to do (yet)."""
        self._left = _TURN_REQUESTS
        self._begun = 0.0
        if self.number and self._stages[self._index]:
            return self._resume()
        try:
            data = self._recv(_REQUEST_SIZE, _NOW)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self.has_ended = True
        return data

    def receive_rest(self, size: int) -> bytes:
        """Return what has arrived of *size* more bytes of a request."""
        self._left -= _TURN_REQUESTS // _TURN_READS  # a client that drips has no turn without end either
        return self._receive(min(size, _READ_SIZE)) if self._left > 0 else b""

    def _receive(self, size: int) -> bytes:
        try:
            data = self._recv(size, _NOW)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self.has_ended = True
        return data

    def may_go_on(self) -> bool:
        """Whether the turn has room for one more request, after the one that was answered just now."""
        self._left -= 1
        if not self._begun:
            self._begun = self.job.ended - self.job.seconds
        return self._left > 0 and self.job.ended - self._begun < _TURN_SECONDS

    def send(self, data: bytes) -> bool:
        """Send a reply; return whether all of it was sent. Otherwise the turn is over: the rest is kept."""
        self.deadline = 0.0
        try:
            sent = self._send(data, _SEND_NOW)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.has_ended = True
            return False
        if sent == len(data):
            return True
        self.stage = Stage.READER
        self.output = data[sent:]
        self.deadline = _deadline(self._limits.write_timeout)
        return False

    def keep_rest(self, data: bytes, missing: int) -> None:
        """Keep the beginning of a request, of which *missing* bytes have not arrived."""
        self.stage = Stage.REST
        self.input, self.missing = data, missing
        self.deadline = self.deadline or _deadline(self._limits.read_timeout)

    def keep_turn(self, data: bytes) -> None:
        """Keep what has not been answered, for another turn."""
        self.input = data
        if self.stage is Stage.REQUEST:
            self.stage = Stage.TURN
            self.deadline = _deadline(self._limits.write_timeout)  # the turn does not come while nobody reads

    def refuse(self, last_words: bytes) -> None:
        """Say the last words, and answer nothing more."""
        if not self.send(last_words):
            self.has_ended = True
            return
        # To close while the client is still talking would reset the connection under our words.
        self.stage = Stage.END
        self.missing = _MOST_LAST_WORDS
        self.deadline = monotonic() + _LAST_WORDS
        with contextlib.suppress(OSError):
            self._end_in_order()

    # What is kept in the table.

    def put_back(self) -> bool:
        """Put it back into the table, with what has to be kept; return whether that is something with a deadline.

        What cannot be put back, since there is no more room, or since the master has closed it, has ended.
        """
        keeps = bool(self.stage)
        if keeps and not self.has_ended:
            try:
                self.store()
            except OSError:
                self._exceed("overflowed")
        if not self.has_ended:
            self._since[self._index] = monotonic()
            try:
                self._modify(self.number, EVENTS[self._stages[self._index]])
            except OSError:
                self.has_ended = True
        return keeps

    def store(self) -> None:
        """Store what has to be kept, if anything has. Raises OSError when there is no room for it."""
        if not self.stage:
            return
        table, index = self._table, self._index
        # First what is needed to give it back: one part may find room, and the other none.
        table.kept[index] = len(self.input)
        table.output[index] = len(self.output)
        table.missing[index] = self.missing or len(self.output)
        table.deadlines[index] = self.deadline
        table.stages[index] = self.stage
        put = table.buffers.put
        if not (put(index, 0, self.input) and (not self.output or put(index, Buffers.OUTPUT, self.output))):
            raise OSError(errno.ENOBUFS, "too much is kept for slow clients")
        self._forget()

    def _resume(self) -> bytes:
        """Go on with what was kept; return the input that can be served, if any."""
        stage = self._table.stages[self._index]
        if stage == Stage.END:
            self._throw_away()
            return b""
        is_late = monotonic() > self._table.deadlines[self._index]
        if stage == Stage.REST:
            data = self._resume_rest()
        elif stage == Stage.READER:
            data = self._resume_reply()
        else:
            data = self._take_input()
        # Not before: it may be we who are late, and not the client.
        if is_late and self._stages[self._index]:
            self._exceed("timed_out")
        return data

    def _exceed(self, limit: str) -> None:
        self.has_ended = True
        self.excess = limit

    def _throw_away(self) -> None:
        patience = self._table.missing[self._index] - len(self._receive(_READ_SIZE))
        self._table.missing[self._index] = max(patience, 0)
        if patience <= 0:
            self.has_ended = True

    def _resume_rest(self) -> bytes:
        table, index = self._table, self._index
        missing, kept = table.missing[index], table.kept[index]
        data = self._receive(min(missing, _READ_SIZE))
        if data and len(data) == missing:
            begun = table.deadlines[index]
            data = self._take_input() + data
            self.deadline = begun  # if no more is known now than how much is missing, the same request goes on
            return data
        if data:
            if not table.buffers.put(index, kept, data):
                self._exceed("overflowed")
            table.kept[index] = kept + len(data)
            table.missing[index] = missing - len(data)
        return b""

    def _resume_reply(self) -> bytes:
        table, index = self._table, self._index
        missing = table.missing[index]
        begin = Buffers.OUTPUT + table.output[index] - missing
        rest = table.buffers.get(index, begin, min(missing, _WRITE_SIZE))
        try:
            sent = self._send(rest, _SEND_NOW)
        except BlockingIOError:
            return b""
        except OSError:
            self.has_ended = True
            return b""
        if sent == missing:
            return self._take_input()
        table.missing[index] = missing - sent
        return b""

    def _take_input(self) -> bytes:
        data = self._table.buffers.get(self._index, 0, self._table.kept[self._index])
        self._table.forget(self.number)
        return data

    # The end.

    def close(self, *, orderly: bool = False) -> bool:
        """Close this descriptor; return whether the connection may be reset if somebody else has another one.

        It may not while the last reply is under way: a reset could overtake and destroy it. Then, and when it shall
        be *orderly*, the client is told that no more will come.
        """
        may_reset = not orderly
        with contextlib.suppress(OSError):
            if orderly or _undelivered(self.sock):
                may_reset = False
                self._end_in_order()
        self.sock.close()
        return may_reset

    def _end_in_order(self) -> None:
        if self.sock.family != socket.AF_UNIX:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ORDERLY_CLOSE)
        self.sock.shutdown(socket.SHUT_WR)


def reset(fd: int, family: int) -> None:
    """Reset a TCP connection, even when other processes hold duplicates; shut any other connection down.

    To close a descriptor ends a connection only if it is the last one, and shutdown(2) sends an orderly end, after
    which Postfix may fail a lookup. connect(2) to AF_UNSPEC "dissolves the association": TCP sends a reset. Python's
    ``socket`` cannot say that, so libc does.
    """
    if family != socket.AF_UNIX:
        _libc.connect(fd, _UNSPECIFIED, len(_UNSPECIFIED))
    _libc.shutdown(fd, socket.SHUT_RDWR)  # after a reset it is not connected, which is what we want


def client_of(sock: socket.socket) -> str:
    """Return the peer's IP address, ``"local"`` for a Unix socket."""
    if sock.family == socket.AF_UNIX:
        return "local"
    try:
        return str(sock.getpeername()[0])
    except OSError:  # it has gone
        return "gone"


def _deadline(timeout: float) -> float:
    return monotonic() + timeout if timeout else float("inf")


def _undelivered(sock: socket.socket) -> int:
    """Return how many bytes that we have sent the client's system has not confirmed (tcp(7), SIOCOUTQ)."""
    number = array.array("i", [0])
    fcntl.ioctl(sock, termios.TIOCOUTQ, number)
    return number[0]
