"""One worker's life: start, then take a connection from the lot, serve it, put it back, again, until it has to leave.

It serves one connection at a time in blocking calls, so a slow job harms no other client; and it owns none whose
client is silent (see ``parking``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import logging
import os
import signal
import socket
import sys
from time import monotonic
from types import FrameType

from setproctitle import setproctitle

from prefork_socketmap.prefork.abort import abort
from prefork_socketmap.prefork.channel import Channel, Kind
from prefork_socketmap.prefork.connection import PATIENCE, Connection, Handler
from prefork_socketmap.prefork.generation import Generation
from prefork_socketmap.prefork.job import Job
from prefork_socketmap.prefork.listener import Listener
from prefork_socketmap.prefork.parking import Inheritance
from prefork_socketmap.prefork.scoreboard import Row, State
from prefork_socketmap.prefork.shared import Shared
from prefork_socketmap.prefork.signals import Handler as SignalHandler
from prefork_socketmap.prefork.signals import Signals
from prefork_socketmap.prefork.waiting import wait_for_words
from prefork_socketmap.settings import SettingError

log = logging.getLogger("prefork_socketmap.worker")

# What the master tells a worker, by signals that it handles itself (see ``Signals.enter_child``).
LEAVE = signal.SIGTERM
INTERRUPT_JOB = signal.SIGUSR2

# accept(2) reports the troubles of the new connection, too; these are ours.
_OUT_OF_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_SLOW = 0.001  # after a job of this length the next one is expected to take as long
_ANY_NUMBER = float("inf")
_SILENCE_CHECK = 1.0  # how often one that cannot park looks whether others need it more than its silent client


class Overdue(BaseException):
    """Raised inside a job that takes longer than its limit. Not an Exception: ``except Exception`` is no escape."""


class _Leave(BaseException):
    """Raised by a signal in the one place where a worker waits with nothing in its hands."""


class Worker:
    """A worker process. The master makes one for all workers of a generation, and forks; ``live`` is a worker's life.

    What is done before the fork is done once, in memory that all share. What a worker does after it costs each of
    them pages of its own: to use an object is to write its reference count.
    """

    row: Row
    job: Job
    _inherited: Inheritance
    _handler: Handler

    def __init__(self, generation: Generation, shared: Shared, signals: Signals) -> None:
        self.generation = generation
        self.must_leave = False
        self._waits = False
        self._plan = generation.plan
        self._limits = generation.plan.limits
        self._listeners = {listener.sock.fileno(): listener for listener in generation.listeners}
        self._board = shared.board
        self._lot = shared.lot
        self._labels = shared.board.labels()
        self._inbox = shared.workers_inbox
        self._lifeline = shared.lifeline
        self.can_park = shared.lot.can_park and self._limits.park_timeout > 0
        self._known: dict[int, Connection] = {}
        self._signals = signals
        self._signal_handlers: dict[int, SignalHandler] = {LEAVE: self._on_leave, INTERRUPT_JOB: self._on_interrupt}
        self._titles = f"{generation.plan.title}: worker, generation {generation.number}, "
        self._title = ""

    def live(self, row: Row, parked: Inheritance) -> int:
        """Be the worker of *row*, in a new process that has duplicates of *parked*; return its exit status."""
        try:
            self._start(row, parked)
        except BaseException as error:  # user code, which may call sys.exit()
            log.debug("the worker cannot start", exc_info=True)
            with contextlib.suppress(OSError):
                # A wrong setting is no reason to try again; anything else may be.
                self._inbox.send(Kind.FAILED, number=isinstance(error, SettingError), text=_describe(error))
            return 1
        try:
            self._run()
        except Exception:
            log.exception("the worker gives up")
            return 1
        return 0

    def _start(self, row: Row, parked: Inheritance) -> None:
        """Get ready to serve, and say so. Raises whatever the start of the handler raises."""
        self.row = row
        self.job = row.job(_vary(self._limits.max_use) if self._limits.max_use else _ANY_NUMBER)
        self._inherited = parked
        self._lot.enter([self._lifeline, *self._listeners])
        self._signals.enter_child(self._signal_handlers)
        self._set_title("starting")
        self._handler = self._plan.start(self._board.open_tallies(row.slot, self._labels))
        # What is there now stays: the collector need not look at it again, nor copy the master's pages to do so.
        gc.freeze()
        self._inbox.send(Kind.READY)

    def _run(self) -> None:
        """Serve connections until it is time to leave."""
        while not self.must_leave:
            connection = self._take()
            if connection:
                self._serve(connection)
            self.row.has_new = False
        self.row.set_state(State.LEAVING)

    # Taking connections.

    def _take(self) -> Connection | None:
        """Wait for the lot to have something for us; return a connection that wants to be served, if it is one."""
        number = self._wait()
        if number is None:
            return None
        if self._lot.is_connection(number):
            return self._take_from_lot(number)
        if number in self._listeners:
            return self._accept(self._listeners[number])
        self.must_leave = self.must_leave or number == self._lifeline
        return None

    def _wait(self) -> int | None:
        try:
            self._waits = True
            if self.must_leave:
                return None
            number = self._lot.wait(0)
            if number is not None:
                return number  # there is enough for everybody: no time to step back
            if self._lot.has_reserve and self._board.count(State.IDLE):
                self.row.set_state(State.RESERVE)
                self._set_title("idle")
                self._lot.wait_in_reserve()
            self.row.set_state(State.IDLE)
            number = self._lot.wait(PATIENCE)
            if number is None:
                self._set_title("idle")  # not for a moment's pause: it costs as much as a lookup in a small map
                number = self._lot.wait()
            return number
        except _Leave:
            # It may have been about to return something. The master arms that again when it has seen us leave.
            return None
        finally:
            self._waits = False

    def _accept(self, listener: Listener) -> Connection | None:
        try:
            sock, address = listener.sock.accept()
        except OSError as error:
            if error.errno in _OUT_OF_MEANS:
                raise
            return None  # another worker was faster, the client has left, or the master has closed the listener
        finally:
            # Now, not after the connection: the next one may be waiting, and another worker idle.
            with contextlib.suppress(FileNotFoundError):  # the master has closed it
                self._lot.put_back(listener.sock.fileno())
        if self._is_refused(address):
            abort(sock)
            sock.close()
            return None
        self.row.count_connection()
        self.row.has_new = True
        self._become_busy(for_long=True)
        try:
            connection = Connection(sock, self)
            connection.set_options()
        except OSError:
            sock.close()  # the client has left already
            return None
        self._set_title(f"serving {connection.client}")
        return connection

    def _is_refused(self, address: object) -> bool:
        allow, limit = self._plan.allow, self._limits.max_connections
        if allow and isinstance(address, tuple) and not allow(address[0]):
            log.warning("connection from %s refused: not in an allowed network", address[0])
        elif limit and self._board.connections >= limit:
            log.warning("connection refused: there are max_connections = %d already", limit)
        else:
            return False
        self.row.count_refused()
        return True

    def _take_from_lot(self, number: int) -> Connection | None:
        serial = self._lot.hold(number, self.row)
        self._become_busy(for_long=self.job.seconds > _SLOW)
        connection = self._known.get(number)
        if connection is None or connection.serial != serial:
            connection = self._meet(number, serial)
        if connection is None:
            return None
        self._set_title(f"serving {connection.client}")
        connection.begin_turn(self._lot.since(number))
        return connection

    def _meet(self, number: int, serial: int) -> Connection | None:
        """Make the acquaintance of the connection with *number*; None when it has just gone."""
        stale = self._known.pop(number, None)
        if stale:
            stale.sock.close()
        inherited_serial, sock = self._inherited.pop(number, (None, None))
        if sock and inherited_serial != serial:
            sock.close()
            sock = None
        sock = sock or self._fetch(number)
        if sock is None:
            return None
        try:
            connection = self._known[number] = Connection(sock, self, number, serial)
        except OSError:
            sock.close()  # the client has left
            self._inbox.send(Kind.GONE, number=number, serial=serial)
            return None
        return connection

    def _fetch(self, number: int) -> socket.socket | None:
        """Ask the master for the connection with *number*; None when it has just gone."""
        answers, enclosed = Channel.pair()
        try:
            self._inbox.send(Kind.FETCH, number=number, connection=enclosed.sock)
            enclosed.close()  # so that the master's is the only one, and its end can be seen
            message = answers.receive()
        except EOFError:
            self.must_leave = True  # the master is gone
            return None
        finally:
            answers.close()
        if not (message and message.connection):
            return None
        fetched = message.connection
        # Not dup2(2): it would close whatever a map's code has open under this number.
        got = fcntl.fcntl(fetched, fcntl.F_DUPFD_CLOEXEC, number)
        sock = socket.socket(fetched.family, fetched.type, fetched.proto, got)
        fetched.close()
        if got != number:
            sock.close()
            raise RuntimeError(f"descriptor {number} is in use: the code of a map has too many files open")
        return sock

    # Serving them.

    def _serve(self, connection: Connection) -> None:
        self.row.client = connection.client
        try:
            self._handler(connection)
        except Exception:
            log.exception("a connection is given up after an error in its handler")
        if self.job.left <= 0:
            self.must_leave = True
        if connection.can_go_on and self.can_park and not self.stops:
            self._park(connection)
        else:
            self._end(connection)

    def _park(self, connection: Connection) -> None:
        """Put the connection back into the lot, or let the master put it there for the first time."""
        try:
            if connection.number:
                self._lot.release(connection.number)
                return
            self._inbox.send(Kind.PARK, connection=connection.sock)
        except OSError:
            self._end(connection)  # the server stops, or the master is gone
        else:
            connection.sock.close()

    def _end(self, connection: Connection) -> None:
        may_reset = connection.close()
        if connection.number:
            del self._known[connection.number]
            if may_reset:
                with contextlib.suppress(OSError):
                    self._inbox.send(Kind.GONE, number=connection.number, serial=connection.serial)

    def _become_busy(self, *, for_long: bool) -> None:
        """Leave the front, and see to it that others are served meanwhile.

        *For long* means by a successor; else the master's eye will do, should it take longer than a moment.
        """
        board = self._board
        self.row.set_state(State.BUSY)
        front, reserve = board.count_idle()
        if front + reserve < self._limits.min_spare and not board.knows_shortage:
            self._inbox.send(Kind.SHORTAGE)
        if front:
            return
        if for_long and reserve and self._lot.has_reserve:
            self._lot.call_reserve()
        elif not board.is_watched:
            self._inbox.send(Kind.EMPTY_FRONT)

    @property
    def stops(self) -> bool:
        """Whether the server stops."""
        return bool(self._board.stopping)

    def is_dispensable(self) -> bool:
        """Whether others can be served while we wait for a client; without a lot we cannot leave it anyway."""
        if not self.can_park:
            return True
        front, reserve = self._board.count_idle()
        if reserve and not front:
            self._lot.call_reserve()
        return front + reserve > 0

    def wait_while_silent(self, sock: socket.socket) -> bool:
        """Wait for the next words of a client that cannot be parked; return False when it is time to let go of it."""
        self.row.set_state(State.WAITING)
        deadline = monotonic() + (self._limits.idle_timeout or float("inf"))
        while not self.must_leave and any(self._board.count_idle()):
            left = deadline - monotonic()
            if left <= 0:
                return False
            if self._wait_for_words(sock, min(left, _SILENCE_CHECK)):
                self.row.set_state(State.BUSY)
                return True
        return False

    def _wait_for_words(self, sock: socket.socket, timeout: float) -> bool:
        try:
            self._waits = True
            return not self.must_leave and wait_for_words(sock, self._lifeline, timeout)
        except _Leave:
            return False
        finally:
            self._waits = False

    def _on_leave(self, _number: int, _frame: FrameType | None) -> None:
        self.must_leave = True
        if self._waits:
            raise _Leave

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        # The signal may be late, and meant for the job before: the clock decides.
        started, limit = self.row.job_started, self._limits.lookup_timeout
        if started and limit and monotonic() - started >= limit:
            raise Overdue

    def _set_title(self, doing: str) -> None:
        if doing != self._title:
            self._title = doing
            setproctitle(self._titles + doing)


def _vary(number: int) -> int:
    """Return *number*, varied by a tenth: workers that started together shall not leave together."""
    # Not with the random module: it is large, and every worker would pay for it with memory.
    return max(1, round(number * (0.9 + 0.2 * os.urandom(1)[0] / 255)))


def _describe(error: BaseException) -> str:
    """Return one line that says what went wrong: the type too, unless the error was worded for the user."""
    text = str(error)
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


def flush_output() -> None:
    """Write what is buffered. To be called before a fork, too: the child would write it a second time."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def leave_process(status: int) -> None:
    """End this process, a fork, without what belongs to the master: its atexit functions, its finally blocks."""
    logging.shutdown()
    flush_output()
    os._exit(status)
