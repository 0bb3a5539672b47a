"""One worker's life: start, then take a connection, serve it, let go of it, again, until it has to leave.

A worker takes connections from *sources*: the listeners, and the lot, where the master puts parked ones. It serves
one at a time in blocking calls, so a slow job harms no other client.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from types import FrameType

from setproctitle import setproctitle

from prefork_socketmap.prefork.channel import Channel, Kind
from prefork_socketmap.prefork.connection import PATIENCE, Connection
from prefork_socketmap.prefork.limits import Limits
from prefork_socketmap.prefork.listener import Listener
from prefork_socketmap.prefork.scoreboard import Row, Scoreboard, State
from prefork_socketmap.prefork.signals import Signals
from prefork_socketmap.prefork.waiting import SilenceWait, SourceWait

log = logging.getLogger("prefork_socketmap.worker")

Handler = Callable[[Connection], None]
"""Serves one connection; returns when it has ended, or when ``Connection.await_request`` returned nothing."""

# What the master tells a worker.
LEAVE = signal.SIGTERM
INTERRUPT_JOB = signal.SIGUSR1
LET_GO = signal.SIGUSR2

# When no worker is idle and connections wait, a client that never pauses hands its worker on after so long.
_TURN = 0.02
# When it is crowded, a client may pause so long between two requests, in milliseconds, before it is parked.
_BREATH = 1


class Overdue(BaseException):
    """Raised inside a job that takes longer than its limit. Not an Exception: ``except Exception`` is no escape."""


@dataclass(frozen=True)
class Surroundings:
    """What a worker finds when it is forked."""

    title: str
    generation: int
    listeners: Sequence[Listener]
    lot: Channel
    inbox: Channel
    board: Scoreboard
    row: Row
    limits: Limits
    start: Callable[[], Handler]
    allow: Callable[[str], bool] | None


def live(around: Surroundings) -> int:
    """Be a worker; return the exit status of the process."""
    try:
        worker = Worker(around)
        worker.start()
    except BaseException as error:  # user code, which may call sys.exit()
        log.debug("the worker cannot start", exc_info=True)
        with contextlib.suppress(OSError):
            around.inbox.send(Kind.FAILED, _describe(error))
        return 1
    try:
        worker.run()
    except Exception:
        log.exception("the worker gives up")
        return 1
    return 0


class Worker:
    """A worker process, from the fork to its exit."""

    def __init__(self, around: Surroundings) -> None:
        self.board = around.board
        self.row = around.row
        self.must_leave = False
        self._let_go = False
        self._around = around
        self._limits = around.limits
        self._signals = Signals()
        self._signals.install(
            {
                LEAVE: self._on_leave,
                INTERRUPT_JOB: self._on_interrupt,
                LET_GO: self._on_let_go,
                # Meant for the master, but sent to all: by a terminal, or by pkill.
                signal.SIGINT: None,
                signal.SIGQUIT: None,
                signal.SIGHUP: None,
            }
        )
        self._sources = SourceWait([*around.listeners, around.lot], self._signals)
        self._silence = SilenceWait(self._signals, around.lot)
        self._jobs_left = _vary(around.limits.max_use) or -1

    def start(self) -> None:
        """Get ready to serve, and say so. Raises whatever the start of the handler raises."""
        # The master blocked all signals around the fork; now there are handlers for them.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        self._set_title("starting")
        self._handler = self._around.start()
        # What is there now stays: the collector need not look at it again, nor copy the master's pages to do so.
        gc.freeze()
        self._become_idle()
        self._around.inbox.send(Kind.READY)

    def run(self) -> None:
        """Serve connections until it is time to leave."""
        while not self.must_leave:
            connection = self._take_connection()
            if connection:
                self._serve(connection)
                self._become_idle()
        self.row.set_state(State.LEAVING)

    def _take_connection(self) -> Connection | None:
        """Wait for the sources; return the first connection that one of them has for us, None when none has."""
        for source in self._sources.wait():
            sock = self._accept(source) if isinstance(source, Listener) else self._take_from(source)
            if sock:
                return self._begin(sock)
        return None

    def _accept(self, listener: Listener) -> socket.socket | None:
        try:
            sock, address = listener.sock.accept()
        except (BlockingIOError, ConnectionError):
            return None  # another worker was faster, or the client has left
        if self._is_refused(address):
            sock.close()
            return None
        return sock

    def _is_refused(self, address: object) -> bool:
        allow, limit = self._around.allow, self._limits.max_connections
        if allow and isinstance(address, tuple) and not allow(address[0]):
            log.warning("connection from %s refused: not in an allowed network", address[0])
        elif limit and self.board.connections >= limit:
            log.warning("connection refused: there are max_connections = %d already", limit)
        else:
            return False
        self.row.count_refused()
        return True

    def _take_from(self, lot: Channel) -> socket.socket | None:
        try:
            message = lot.receive()
        except EOFError:
            self.must_leave = True  # the master is gone
            return None
        if not (message and message.connection):
            return None
        self.row.count_taken()
        return message.connection

    def _begin(self, sock: socket.socket) -> Connection | None:
        self.row.count_connection()
        self.row.set_state(State.BUSY)
        self._ask_for_more_workers()
        try:
            connection = Connection(sock, self)
        except OSError:
            sock.close()  # the client has left already
            self._become_idle()
            return None
        self._set_title(f"serving {connection.client}")
        return connection

    def _ask_for_more_workers(self) -> None:
        """Tell the master when too few workers are left for the next connections, and it can do something."""
        idle = self.board.count(State.IDLE)
        if idle < self._limits.min_spare and not (self.board.full and (idle or self.board.crowded)):
            self._around.inbox.send(Kind.SPARE)

    def _serve(self, connection: Connection) -> None:
        try:
            self._handler(connection)
        except Exception:
            log.exception("a connection is given up after an error in its handler")
        if connection.can_go_on and self._limits.park_timeout and not self.board.stopping:
            self._park(connection)
        else:
            connection.close()

    def _park(self, connection: Connection) -> None:
        """Give the connection to the master, for the time until its client speaks again."""
        try:
            self._around.inbox.send(Kind.CONNECTION, connection=connection.sock)
        except OSError:
            connection.close()  # the master is gone
        else:
            connection.sock.close()

    def _become_idle(self) -> None:
        if self.must_leave:
            return
        self._set_title("idle")
        self.row.set_state(State.IDLE)

    def wait_while_silent(self, sock: socket.socket) -> bool:
        """Wait for a silent client's next words; return False when it is time to let go of it."""
        # In this order: the master may say LET_GO as soon as it sees the state.
        self._let_go = False
        self.row.set_state(State.WAITING)
        limit = self._limits.idle_timeout
        deadline = monotonic() + max(limit - PATIENCE, 0.0) if limit else None
        while not (self.must_leave or self._let_go):
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0:
                return False
            ready = self._silence.wait(sock, left)
            if sock.fileno() in ready:
                self.row.set_state(State.BUSY)
                return True
            self.must_leave = self.must_leave or self._silence.master_is_gone(ready)
        return False

    def may_keep(self, sock: socket.socket, taken: float) -> bool:
        """Return, when it is crowded, whether to go on with a client: it speaks, and nobody waits for a turn."""
        if monotonic() - taken > _TURN and not self.board.count(State.IDLE):
            return False
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(_BREATH))

    def job_begins(self) -> None:
        """Begin a job: it counts for max_use, and may be interrupted from now on."""
        self._jobs_left -= 1
        if not self._jobs_left:
            self.must_leave = True
        self.row.job_begins()

    def _on_leave(self, _number: int, _frame: FrameType | None) -> None:
        self.must_leave = True

    def _on_let_go(self, _number: int, _frame: FrameType | None) -> None:
        self._let_go = True

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        # The signal may be late, and meant for the job before: the clock decides.
        started = self.row.job_started
        if started and monotonic() - started >= self._limits.lookup_timeout:
            raise Overdue

    def _set_title(self, doing: str) -> None:
        around = self._around
        setproctitle(f"{around.title}: worker, generation {around.generation}, {doing}")


def _vary(number: int) -> int:
    """Return *number*, varied by a tenth: workers that started together shall not leave together."""
    return round(number * random.uniform(0.9, 1.1)) if number else 0  # noqa: S311 - no secret


def _describe(error: BaseException) -> str:
    """Return one line that says what went wrong: the type too, unless the error was worded for the user."""
    text = str(error)
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


def leave_process(status: int) -> None:
    """End this process, a fork, without what belongs to the master: its atexit functions, its finally blocks."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)
