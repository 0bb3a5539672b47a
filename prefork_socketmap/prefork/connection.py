"""One accepted connection as a worker holds it: bounded waits, whole replies, and the right kind of close.

The kernel's own timeouts bound each call, so that a busy connection costs one ``recv`` and one ``send`` per job and
nothing else; only when one of them expires is there a wait with a clock. They are short (PATIENCE), because that is
also how late a worker notices what it is told while it is inside such a call.
"""

from __future__ import annotations

import array
import contextlib
import enum
import fcntl
import select
import socket
import struct
import termios
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from prefork_socketmap.prefork.job import Job
from prefork_socketmap.prefork.waiting import LONGEST_WAIT

PATIENCE = 0.05
_UNCHECKED = 15  # so many requests of a busy client are awaited without a look at who else needs the worker
_STOP_CHECK = 0.5  # how often one that waits for the rest of a request looks whether the server stops
# A request with an address fits, and so does the bytes object in what the interpreter allocates without malloc(3).
_REQUEST_SIZE = 476
_READ_SIZE = 4096  # Postfix writes at most so much at a time
_KERNEL_TIMEOUT = struct.pack("@ll", 0, int(PATIENCE * 1e6))
_RESET_ON_CLOSE = struct.pack("@ii", 1, 0)
_ORDERLY_CLOSE = struct.pack("@ii", 0, 0)
_DRAIN_TIME = 1.0
_DRAIN_READS = 256


class Ending(enum.Enum):
    """Why a worker is done with a connection."""

    GONE = "the client hung up, or does not read, or takes too long"
    SILENT = "the client has said nothing for a while"
    MOVED = "the worker has to leave, or is needed elsewhere, perhaps right after a reply"
    REFUSED = "the last words were ours, and the client may still be talking"


class Holder(Protocol):
    """Who has a connection in hand: what it needs to know of its worker."""

    must_leave: bool
    can_park: bool
    job: Job

    @property
    def stops(self) -> bool: ...  # noqa: D102
    def is_dispensable(self) -> bool: ...  # noqa: D102
    def wait_while_silent(self, sock: socket.socket) -> bool: ...  # noqa: D102


Handler = Callable[["Connection"], None]
"""Serves one connection; returns when it has ended, or when ``Connection.await_request`` returned nothing."""


class Connection:
    """A connection in the hands of a worker.

    ``client`` is the peer's IP address, or ``"local"`` for a Unix socket. ``number`` and ``serial`` say where it
    stands in the lot, if it does (see ``parking``). ``ending`` says how a turn of serving it ended; a handler sets it
    to REFUSED when it has sent something after which it does not want to read on. ``job`` is for what has a time
    limit: past it, ``Overdue`` is raised between the job's begin and its end.
    """

    def __init__(self, sock: socket.socket, holder: Holder, number: int = 0, serial: int = 0) -> None:
        self.sock = sock
        self.number = number
        self.serial = serial
        self.ending = Ending.GONE
        self.job = holder.job
        self._holder = holder
        self._recv = sock.recv
        self._send = sock.send
        if sock.gettimeout() is not None:
            # The program has set a default timeout, for the sake of its databases perhaps. The kernel's are ours.
            sock.settimeout(None)
        self._is_tcp = sock.family != socket.AF_UNIX
        self._unchecked = 0
        # A new client has more than one question, as a rule: Postfix asks for sender and recipient in one go.
        self._is_busy = True
        self.client = sock.getpeername()[0] if self._is_tcp else "local"

    def set_options(self) -> None:
        """Set the options of a socket that was just accepted."""
        sock = self.sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _KERNEL_TIMEOUT)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _KERNEL_TIMEOUT)
        if self._is_tcp:
            # Whatever ends this connection, a crash included, reaches Postfix as a reset: the one kind of close of a
            # TCP connection that it always retries. An orderly close can make it defer mail (a stale errno).
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def begin_turn(self, silent_since: float) -> None:
        """Begin to serve a connection from the lot, whose client was silent from *silent_since* until now."""
        self.ending = Ending.GONE
        self._unchecked = 1  # it has spoken: there is nothing to wait for
        self._is_busy = monotonic() - silent_since < PATIENCE

    def await_request(self) -> bytes:
        """Return the first bytes of the next request, or none when the handler shall return.

        To be called between two requests: here the worker lets go of a connection when the client is silent, when
        others need the worker more, or when the worker has to leave.
        """
        if self._holder.must_leave or self.job.left <= 0:
            self.ending = Ending.MOVED
            return b""
        if self._unchecked:
            self._unchecked -= 1
        elif not self._may_wait():
            self.ending = Ending.MOVED
            return b""
        receive = self._recv  # to call it right there would look for a method first
        try:
            return receive(_REQUEST_SIZE)
        except BlockingIOError:
            return self._await_silent()
        except OSError:
            return b""

    def _may_wait(self) -> bool:
        """Whether to wait for the next request: a busy client's, while another worker is there for other clients."""
        if not self._is_busy:
            return not self._holder.can_park
        self._unchecked = _UNCHECKED  # now and then is enough, and costs a busy client nothing
        return self._holder.is_dispensable()

    def _await_silent(self) -> bytes:
        """Wait for a client that has not spoken for PATIENCE, where the connection cannot be parked."""
        if self._holder.can_park or not self._holder.wait_while_silent(self.sock):
            self.ending = Ending.SILENT
            return b""
        return self._receive_now()

    def _receive_now(self) -> bytes:
        """Receive what has arrived."""
        try:
            return self._recv(_READ_SIZE)
        except OSError:
            return b""

    def receive_until(self, deadline: float) -> bytes:
        """Return more bytes of a request that has begun; none when the client hung up or *deadline* has passed.

        None, too, when the server stops: half a request is no lookup under way that it would have to wait for.
        """
        # Bytes that drip in without a pause never get as far as the wait below.
        if monotonic() >= deadline or self._holder.stops:
            return b""
        try:
            return self._recv(_READ_SIZE)
        except BlockingIOError:
            return self._receive_now() if self._wait_for_rest(deadline) else b""
        except OSError:
            return b""

    def _wait_for_rest(self, deadline: float) -> bool:
        while not self._holder.stops and monotonic() < deadline:
            if self._wait_for(select.POLLIN, min(deadline, monotonic() + _STOP_CHECK)):
                return True
        return False

    def send(self, data: bytes, timeout: float) -> bool:
        """Send all of *data* within *timeout* seconds (0: however long it takes); return whether that succeeded."""
        send = self._send
        try:
            sent = send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return False
        return sent == len(data) or self._send_rest(memoryview(data)[sent:], monotonic() + (timeout or float("inf")))

    def _send_rest(self, rest: memoryview, deadline: float) -> bool:
        while rest:
            if not self._wait_for(select.POLLOUT, deadline):
                return False
            try:
                rest = rest[self.sock.send(rest, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                continue
            except OSError:
                return False
        return True

    def _wait_for(self, event: int, deadline: float) -> bool:
        poll = select.poll()
        poll.register(self.sock, event)
        left = deadline - monotonic()
        return left > 0 and bool(poll.poll(min(left, LONGEST_WAIT) * 1000))

    @property
    def can_go_on(self) -> bool:
        """Whether the connection is sound, between two requests, and may be served further by somebody else."""
        return self.ending in (Ending.SILENT, Ending.MOVED)

    def close(self) -> bool:
        """Close the connection; return whether it may be reset now, if somebody else has a descriptor of it, too."""
        delivered = True
        with contextlib.suppress(OSError):
            if self.ending is Ending.REFUSED:
                self._drain()
            elif self.ending is Ending.MOVED and _undelivered(self.sock):
                delivered = False
                self._end_in_order()
        self.sock.close()
        return delivered

    def _end_in_order(self) -> None:
        """Say that no more will come, behind what is under way: a reset could overtake and destroy it."""
        if self._is_tcp:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ORDERLY_CLOSE)
        self.sock.shutdown(socket.SHUT_WR)

    def _drain(self) -> None:
        """Read what the client still sends: to close with unread input would reset the connection under our reply."""
        self._end_in_order()
        deadline = monotonic() + _DRAIN_TIME
        for _ in range(_DRAIN_READS):
            if not self.receive_until(deadline):
                return


def _undelivered(sock: socket.socket) -> int:
    """Return how many bytes that we have sent the client's system has not confirmed (tcp(7), SIOCOUTQ)."""
    number = array.array("i", [0])
    fcntl.ioctl(sock, termios.TIOCOUTQ, number)
    return number[0]
