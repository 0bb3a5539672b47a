"""The way of log lines out of the process, to stderr or to a syslog daemon, without waiting for whoever reads them.

Who reads a log may stop reading: a pipe that is full blocks who writes to it, and so does syslog(3). A master that
waits there starts no worker, and a worker answers nobody. So a line that cannot leave waits in a queue, and one for
which the queue has no room is lost; the count of the lost ones follows as soon as lines flow again.

A reader that does read may still be some lines behind: a syslog daemon's socket takes ten on many systems, less than
a traceback. For that a process has some patience, a tenth of a second in a minute, all in all.

What lines say, and which of them are worth saying, is decided in ``log``.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import os
import select
import socket
import stat
import syslog
import time
from collections import deque
from pathlib import Path

from prefork_socketmap.daemon import journal

MAX_QUEUE = 65536
PATIENCE = 0.1
_PATIENCE_RETURNS = 60.0


class Outlet(abc.ABC):
    """Sends lines, in order; queues at most *max_queue* bytes of them.

    A line is sent when the next one is written, at the latest, or by ``flush``. In a process that is forked off, the
    queue is its parent's: call ``forget`` there.
    """

    def __init__(self, max_queue: int = MAX_QUEUE) -> None:
        self._max_queue = max_queue
        self._queue = deque[bytes]()
        self._size = 0
        self._lost = 0
        self._patience = PATIENCE
        self._patience_since = time.monotonic()

    @property
    def is_waiting(self) -> bool:
        """Whether there is something left to send."""
        return bool(self._queue or self._lost)

    def write(self, priority: int, line: str) -> None:
        """Send *line*, which is printable, or queue it. *priority* is one of syslog's. Raises nothing."""
        if self.flush():
            self._enqueue(priority, line)
            self.flush()
        elif self._lost or self._size >= self._max_queue:  # the count comes where the lines are missing
            self._lost += 1
        else:
            self._enqueue(priority, line)

    def flush(self) -> bool:
        """Send what waits, as far as there is room for it; return whether nothing is left."""
        while self.is_waiting:
            if not self._queue:
                self._enqueue(syslog.LOG_WARNING, f"warning: {self._lost} lines of this log are lost: nobody read it")
                self._lost = 0
            data = self._queue[0]
            try:
                sent = self._send(data)
            except BlockingIOError:
                if not self._wait():
                    return False
                continue
            except OSError:
                return False
            self._size -= sent
            if sent < len(data):
                self._queue[0] = data[sent:]
            else:
                self._queue.popleft()
        return True

    def forget(self) -> None:
        """In a process that was forked off: begin anew, with nothing of the parent's."""
        self._queue.clear()
        self._size = self._lost = 0
        self.close()

    def _enqueue(self, priority: int, line: str) -> None:
        self._queue.append(self._frame(priority, line))
        self._size += len(self._queue[-1])

    def _wait(self) -> bool:
        """Wait for room, while there is patience; return whether there is room."""
        begin = time.monotonic()
        if begin - self._patience_since >= _PATIENCE_RETURNS:
            self._patience, self._patience_since = PATIENCE, begin
        if self._patience <= 0:
            return False
        has_room = _has_room(self._fileno(), self._patience)
        self._patience -= time.monotonic() - begin
        return has_room

    @abc.abstractmethod
    def close(self) -> None:
        """Close what was opened. What is written later opens it again."""

    @abc.abstractmethod
    def _frame(self, priority: int, line: str) -> bytes:
        """Return what is sent for *line*."""

    @abc.abstractmethod
    def _send(self, data: bytes) -> int:
        """Send *data*, or its beginning, without blocking; return how much. Raises OSError."""

    @abc.abstractmethod
    def _fileno(self) -> int:
        """Return the descriptor that was found full."""


def _has_room(descriptor: int, timeout: float) -> bool:
    """Wait until something can be written to *descriptor*, for *timeout* seconds; return whether it can."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(timeout * 1000))


class Stderr(Outlet):
    """Writes to the descriptor 2, or to *descriptor*; each line begins with *name* and the process id.

    When the journal reads them, a line begins with its priority, and of *name* with what stands behind a slash: the
    journal has a tag already.

    Others write there, too: the processes of this server, and whoever started it. So the open file that they share is
    not made non-blocking. A pipe or a terminal is opened a second time for that, and a socket, such as the journal's,
    has a flag for each message. Where /proc does not allow the second opening poll(2) is asked before each write;
    then another process can take the room that it has reported, but only in that moment.

    With *waits* it blocks after all: for a command whose output somebody reads at leisure.
    """

    def __init__(self, name: str, max_queue: int = MAX_QUEUE, *, descriptor: int = 2, waits: bool = False) -> None:
        super().__init__(max_queue)
        self._is_for_journal = journal.reads(descriptor)
        self._name = name.rpartition("/")[2] if self._is_for_journal else name
        self._descriptor = descriptor
        self._waits = waits
        self._own: int | None = None
        self._socket: socket.socket | None = None
        self._is_open = False
        if not waits:
            self._open()  # now: a worker is about to give up the rights that this may need

    def close(self) -> None:
        """Close the second opening."""
        self._is_open = False
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._own is not None:
            os.close(self._own)
            self._own = None

    def _frame(self, priority: int, line: str) -> bytes:
        begin = f"<{priority}>" if self._is_for_journal else ""
        return f"{begin}{self._name}[{os.getpid()}]: {line}\n".encode("utf-8", "backslashreplace")

    def _open(self) -> None:
        self._is_open = True
        with contextlib.suppress(OSError):
            mode = os.fstat(self._descriptor).st_mode
            if stat.S_ISSOCK(mode):
                self._socket = socket.socket(fileno=os.dup(self._descriptor))
            elif stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._own = os.open(f"/proc/self/fd/{self._descriptor}", flags)

    def _send(self, data: bytes) -> int:
        if self._waits:
            return os.write(self._descriptor, data)
        if not self._is_open:
            self._open()
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        # At most so much goes into a pipe in one piece, and none of it if there is no room.
        piece = data[: select.PIPE_BUF]
        if self._own is not None:
            return os.write(self._own, piece)
        if not _has_room(self._descriptor, 0):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return os.write(self._descriptor, piece)

    def _fileno(self) -> int:
        return self._descriptor


class Syslog(Outlet):
    """Sends to the syslog daemon, facility mail, as syslog(3) does, which can block.

    Each line begins with *name* and the process id. A daemon that was restarted, or starts late, is found again.
    """

    path = Path("/dev/log")

    def __init__(self, name: str, max_queue: int = MAX_QUEUE) -> None:
        super().__init__(max_queue)
        self._name = name
        self._kind = socket.SOCK_DGRAM
        self._socket: socket.socket | None = None

    def close(self) -> None:
        """Close the connection to the daemon."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _frame(self, priority: int, line: str) -> bytes:
        # asctime() is ctime(3): the date as syslog daemons expect it, in no language but English.
        date = time.asctime()[4:19]
        line = f"<{syslog.LOG_MAIL | priority}>{date} {self._name}[{os.getpid()}]: {line}"
        return line.encode("utf-8", "backslashreplace") + b"\0"  # where the daemon has a stream, this ends the line

    def _send(self, data: bytes) -> int:
        try:
            if self._socket is None:
                self._socket = self._connect()
            return self._socket.send(data, socket.MSG_NOSIGNAL)
        except OSError as error:
            if isinstance(error, BlockingIOError) and self._kind == socket.SOCK_STREAM:
                raise
            # The daemon is gone, or stuck. One that was started since then is to get this line already.
            self.close()
            self._socket = self._connect()
            return self._socket.send(data, socket.MSG_NOSIGNAL)

    def _fileno(self) -> int:
        if self._socket is None:
            raise ValueError("there is no socket that could be full")
        return self._socket.fileno()

    def _connect(self) -> socket.socket:
        try:
            return self._connect_as(self._kind)
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise
            self._kind = socket.SOCK_STREAM if self._kind == socket.SOCK_DGRAM else socket.SOCK_DGRAM
            return self._connect_as(self._kind)

    def _connect_as(self, kind: int) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, kind)
        try:
            sock.setblocking(False)
            sock.connect(str(self.path))
        except BlockingIOError as error:  # a stream whose queue of connections is full: there is nothing to wait for
            sock.close()
            raise ConnectionError(str(error)) from error
        except BaseException:
            sock.close()
            raise
        return sock
