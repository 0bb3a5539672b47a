"""One worker's life: start, then take a connection that has something to say, serve it, put it back, until it leaves.

A worker is held by a job, never by a client. It has one connection in hand at a time, for one turn (see
``connection``), and owns none (see ``table``). On duty or in reserve it waits in exactly one place (see ``duty``).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import sys
import time
from time import monotonic
from types import FrameType

from setproctitle import setproctitle

from prefork_socketmap.prefork import interruption, orphan
from prefork_socketmap.prefork.channel import Given, Kind
from prefork_socketmap.prefork.connection import REASONS, Connection, Handler, Job, reset
from prefork_socketmap.prefork.descriptors import Descriptors
from prefork_socketmap.prefork.generation import Generation
from prefork_socketmap.prefork.listener import Listener
from prefork_socketmap.prefork.scoreboard import RESERVATIONS, RETIRED, SLOW, STOPPING, WATCHED, Cells, Row, State
from prefork_socketmap.prefork.shared import Shared, freeze, is_ready
from prefork_socketmap.prefork.signals import Handler as SignalHandler
from prefork_socketmap.prefork.signals import Signals
from prefork_socketmap.settings import SettingError

log = logging.getLogger("prefork_socketmap.worker")

# accept(2) reports the troubles of the new connection, too; these are ours.
_OUT_OF_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_ANY_NUMBER = float("inf")
_MOMENT = 1.0  # ms: so long a worker waits for a new client's next words
_FIRST_TURNS = 8  # so often, at most
_LONG_MOMENT = 20.0  # ms: the same, while the master is away
_ROUND = 100  # turns after which a worker looks whether there are more on duty than there are places
_PAUSE = 0.05  # s: after it the master is told again what it had no room for
# Seconds: a master that does not give a worker more places within the one is behind, within the other away.
_PATIENCE, _LONG_PATIENCE = 0.05, 0.5
# So often, with such pauses (s), workers look for who knows a connection: on a busy machine its turn comes late.
_LOOKS, _LOOK_PAUSE = 50, 0.005
_BREATH = 0.001  # s: a pause in which somebody else can do what this worker cannot
_NO_PLACE = "[%s]: connection refused: no room in the table of connections, or the master has fallen behind"


class Overdue(BaseException):
    """Raised inside a job that takes longer than its limit. Not an Exception: ``except Exception`` is no escape."""


class Worker:
    """A worker process. The master makes one for all workers of a generation, and forks; ``live`` is a worker's life.

    What is done before the fork is done once, in memory that all share. What a worker does after it costs each of
    them pages of its own: to use an object is to write its reference count.
    """

    row: Row
    job: Job
    _cells: Cells
    _handler: Handler
    _descriptors: Descriptors

    def __init__(self, generation: Generation, shared: Shared, signals: Signals) -> None:
        self.generation = generation
        self._number = generation.number
        self._plan = generation.plan
        self._limits = generation.plan.limits
        self._duty = generation.duty
        self._listeners = {listener.sock.fileno(): listener for listener in generation.listeners}
        self._shared = shared
        self._board = shared.board
        self._table = shared.table
        self._to_master = shared.to_master
        self._labels = shared.board.labels()
        self._unsaid: list[tuple[int, int, bool]] = []
        self._unused: list[tuple[int, int]] = []
        self._leaving = False
        self._on_duty = False
        self._is_fork = False
        self._newcomer: socket.socket | None = None
        self._newcomers_speak = True
        self._signals = signals
        self._signal_handlers: dict[int, SignalHandler] = {signal.SIGUSR2: self._on_interrupt}
        self._titles = f"{generation.plan.title}: worker, generation {generation.number}, "
        self._title = ""

    def live(self, row: Row, inherited: dict[int, Given], horizon: int) -> int:
        """Be the worker of *row*, in a new process; return its exit status.

        It has duplicates of *inherited*: all connections that came up to *horizon*.
        """
        self.row = row
        os.register_at_fork(after_in_child=self._leave_to_fork)
        try:
            self._start()
            self._descriptors = Descriptors(inherited, horizon, self._shared, self._limits, self.job)
            self._say_ready()
        except BaseException as error:  # user code, which may call sys.exit()
            log.debug("the worker cannot start", exc_info=True)
            with contextlib.suppress(OSError):
                # A wrong setting is no reason to try again; anything else may be.
                is_setting = isinstance(error, SettingError) and not error.may_pass
                self._to_master.send(Kind.FAILED, number=is_setting, text=_describe(error))
            return 1
        try:
            self._work()
            self._plan.stop()
        except Exception:
            log.exception("the worker gives up")
            return 1
        return 0

    def _start(self) -> None:
        """Get ready to serve. Raises whatever the start of the handler raises."""
        row = self.row
        use = _vary(self._limits.max_use) if self._limits.max_use else _ANY_NUMBER
        self.job = Job(row.job_cells(), use, self._before_long_job)
        self._cells = row.cells()
        self._signals.enter_child(self._signal_handlers)
        handlers_run = interruption.handlers_run(signal.SIGUSR2, self._signal_handlers)
        self._set_title("starting")
        counters = self._board.open_counters(row.slot, self._labels)
        self._board.leave_to_child()  # now: what follows is somebody else's code
        self._handler = self._plan.start(counters)
        if not handlers_run:
            self._interrupter = interruption.Interrupter(signal.SIGUSR2, self._on_interrupt)
        orphan.ask_for_signal(signal.SIGUSR2)
        # What is there now stays: the collector need not look at it again, nor copy the master's pages to do so.
        freeze()
        self._set_title("idle")

    def _say_ready(self) -> None:
        while True:
            try:
                self._to_master.send(Kind.READY)
            except BlockingIOError:  # the master is away
                time.sleep(_PAUSE)
            else:
                return

    def _work(self) -> None:
        """Serve connections until it is time to leave."""
        while not self._must_leave():
            if self._duty.free_places(monotonic()):
                self._serve_on_duty()
            else:
                self._wait_in_reserve()
        self._leave()

    def _must_leave(self) -> bool:
        return self._leaving or self.job.left <= 0 or self._board.retired >= self._number

    def _wait_in_reserve(self) -> None:
        self._say_all()
        self._descriptors.forget_the_gone()
        self._set_title("idle")
        self.row.set_state(State.RESERVE)
        if self._duty.wait_in_reserve(self._plan.defers):
            self._serve_on_duty()
        else:
            self._leaving = True

    def _leave(self) -> None:
        self._say_all()
        self.row.set_state(State.LEAVING)
        self._set_title("leaving")
        self._duty.call()  # whoever has left duty leaves it to a successor
        if orphan.is_orphan(self._shared.lifeline.fd):
            orphan.close_up(self._board, self._listeners.values())

    # On duty.

    def _serve_on_duty(self) -> None:
        """Serve whoever speaks, until this worker has to leave, or its place has gone to somebody else."""
        # Local names, since this is the way of every lookup.
        states, slot, words, number_of_generation = self._board.states, self.row.slot, self._board.words, self._number
        table, known = self._table, self._descriptors.known
        wait, serials, first = table.wait, table.serials, table.first
        held, client, since = self._cells.held, self._cells.client, self._cells.since
        job, handler, put_back, unsaid = self.job, self._handler, self._put_back, self._unsaid
        idle, serving, busy = int(State.IDLE), int(State.SERVING), int(State.BUSY)
        turns = 0
        self._on_duty = True
        self.row.set_state(State.IDLE)
        while not (self._leaving or job.left <= 0 or words[RETIRED] >= number_of_generation):
            events = wait(_PAUSE if unsaid else -1, 1)
            if not events:
                self._say_who_has_gone()
                continue
            number = events[0][0]
            held[0] = number  # it is in our hands, whatever happens now
            states[slot] = serving
            connection = known.get(number)
            if connection is None or connection.serial != serials[number - first]:
                connection = self._take(number)
            if connection is not None:
                held[0] = connection.number
                client[:] = connection.label
                if not words[WATCHED]:
                    self._have_others_watched()
                try:
                    handler(connection)
                except Exception:  # noqa: BLE001 - it is logged there
                    self._give_up(connection)
                put_back(connection)
            since[0] = job.ended
            held[0] = 0
            turns += 1
            if not self._on_duty or job.seconds > SLOW or turns % _ROUND == 0:
                job.seconds = 0.0
                states[slot] = busy  # not to count itself
                if not self._duty.free_places(monotonic()):
                    return  # when several were called there are too many for a while
                self._on_duty = True
                self._set_title("idle")
            states[slot] = idle

    def _have_others_watched(self) -> None:
        """See to it that the master looks after clients, when nobody waits on duty."""
        board = self._board
        if State.IDLE not in bytes(board.states[: board.slots]):
            board.watched = 1
            self._shared.bell.ring()

    def _before_long_job(self) -> None:
        """Leave the place on duty to somebody else, since the next job will take long."""
        if not self._on_duty:
            return
        self._on_duty = False
        board = self._board
        self.row.set_state(State.BUSY)
        spare = board.count(State.IDLE, State.SERVING, State.RESERVE, State.STARTING)
        free = self._duty.free_places(monotonic())
        has_successor = not free or self._duty.call(free)
        if not (board.exhausted or (has_successor and spare >= self._limits.min_spare)):
            board.watched = 1
            self._shared.bell.ring()  # the master has to start more
        self._set_title(f"serving {self.row.client}")

    def _give_up(self, connection: Connection) -> None:
        log.exception("a connection is given up after an error in its handler")
        connection.has_ended = True

    def _put_back(self, connection: Connection) -> None:
        """Put a connection where it stands in the table, or end it."""
        stops = self._board.words[STOPPING]
        if not stops and connection.put_back():
            self._shared.bell.ring()  # it has a deadline now
        if stops or connection.has_ended:
            self._end(connection)

    def _end(self, connection: Connection) -> None:
        if connection.excess:
            self.row.increment("connections", connection.excess)
            level, text = REASONS[connection.excess]
            log.log(level, text, connection.client)
        may_reset = connection.close()
        self._descriptors.forget(connection.number)
        self._unsaid.append((connection.number, connection.serial, may_reset))
        self._say_who_has_gone()

    def _say_all(self) -> None:
        """Tell the master which connections have ended, however long it takes; but not when it is gone."""
        self._say_who_has_gone()
        while self._unsaid and not orphan.is_orphan(self._shared.lifeline.fd):
            self.row.set_state(State.BUSY)
            time.sleep(_PAUSE)
            self._say_who_has_gone()

    def _say_who_has_gone(self) -> None:
        """Tell the master which connections have ended. If it is away it is told the next time."""
        with contextlib.suppress(OSError):
            while self._unsaid:
                number, serial, may_reset = self._unsaid[-1]
                self._to_master.send(Kind.GONE if may_reset else Kind.ENDED, number, serial)
                self._unsaid.pop()

    # What does not happen at every lookup.

    def _take(self, number: int) -> Connection | None:
        """Take what is no connection that this worker knows; return one that it gets to know."""
        if number in self._listeners:
            self._accept(self._listeners[number])
        elif number >= self._table.first:
            return self._receive(number)
        elif number == self._table.nudged:
            return self._look_for_astray()
        elif number == self._shared.lifeline.fd or self._duty.is_dismissal(number):
            self._leaving = True
        else:
            time.sleep(_BREATH)  # another generation's, which is on its way out
        return None

    def _receive(self, number: int) -> Connection | None:
        """Return a connection that this worker has not met before; None if it has gone, or another one has it."""
        index = number - self._table.first
        serial = self._table.serials[index]
        if not serial:
            return None
        connection = self._descriptors.receive(number, serial)
        if connection or serial != self._table.serials[index]:
            return connection
        # The master is away. Without a descriptor we cannot even put it back: whoever has one shall, or the master.
        self._table.leave_astray(number, serial)
        self._board.astray = 1
        self._shared.bell.ring()
        self._board.looks = _LOOKS
        self._table.nudge()  # while we do not wait ourselves: so it is another one
        return None

    def _look_for_astray(self) -> Connection | None:
        """Put back what others could not receive and this worker can; return one of them, to be served."""
        found = self._descriptors.find(self._table.bring_back)
        for connection in found[1:]:
            with contextlib.suppress(OSError):  # it has been closed
                self._table.arm(connection.number)
        if self._board.looks:
            self._board.looks -= 1
            self._table.nudge()  # others may have what this one has not
            if not found:
                self._duty.call()  # who knows it may be in reserve
                time.sleep(_LOOK_PAUSE)
        return found[0] if found else None

    def _accept(self, listener: Listener) -> None:
        try:
            sock, address = listener.sock.accept()
        except OSError as error:
            if error.errno in _OUT_OF_MEANS:
                raise
            return  # another worker was faster, the client has left, or the master has closed the listener
        finally:
            # Now, not after the connection: the next one may be waiting, and another worker idle.
            with contextlib.suppress(OSError):  # the master has closed it
                self._table.arm_listener(listener.sock.fileno())
        allow = self._plan.allow
        if allow and isinstance(address, tuple) and not allow(address[0]):
            log.warning("connection from [%s] refused: not in an allowed network", address[0])
            self._refuse(sock)
            return
        self.row.increment("connections", "accepted")
        if not self._board.watched:
            self._have_others_watched()
        self._serve_newcomer(Connection(sock, self._table, self._limits, self.job))

    def _refuse(self, sock: socket.socket) -> None:
        self.row.increment("connections", "refused")
        reset(sock.fileno(), sock.family)
        sock.close()

    # New connections.

    def _serve_newcomer(self, connection: Connection) -> None:
        """Answer a new client's first requests, as they come within a moment, then pass the connection on."""
        self._cells.client[:] = connection.label
        self._newcomer = connection.sock
        is_crowded = self._is_crowded()
        # A client that soon has no more questions is spared the table.
        turns = 0 if is_crowded else _FIRST_TURNS
        while turns and self._serve(connection) and not connection.stage and self._wait_a_moment(connection.sock):
            turns = 0 if self._must_leave() else turns - 1
        if connection.has_ended or self._board.stopping:
            connection.close()
        else:
            self._hand_over(connection, is_crowded=is_crowded)

    def _serve(self, connection: Connection) -> bool:
        """Serve a turn of a connection that is not in the table yet; return whether it goes on."""
        try:
            self._handler(connection)
        except Exception:  # noqa: BLE001
            self._give_up(connection)
        return not (connection.has_ended or self._board.stopping)

    def _is_crowded(self) -> bool:
        """Whether the master has to decide about a new connection, since there may be too many."""
        board = self._board
        return board.connections + board.slots * (RESERVATIONS + 1) > board.connection_limit

    def _wait_a_moment(self, sock: socket.socket) -> bool:
        """Wait for more words of a new client; return whether some came.

        Who has waited in vain does not, while others are waiting. A client that asks once and hangs up does so within
        a fraction of the moment.
        """
        if not self._newcomers_speak and self._board.count(State.IDLE) == 0 and self._table.has_work():
            return False
        self._newcomers_speak = is_ready(sock.fileno(), milliseconds=_MOMENT)
        return self._newcomers_speak

    def _hand_over(self, connection: Connection, *, is_crowded: bool) -> None:
        """Put a new connection into the table, at a place that the master has reserved, and give it a duplicate."""
        place = self._await_place(connection, is_crowded=is_crowded)
        if not place:
            if connection.has_ended:
                connection.close()
            else:
                log.warning(_NO_PLACE, connection.client)
                self._refuse(connection.sock)
            return
        self._descriptors.settle(connection, *place)
        self._table.begin(*place)
        has_deadline = bool(connection.stage)
        reason = "overflowed", REASONS["overflowed"][1]
        try:
            connection.store()  # before the master, or we ourselves, let others have it
            reason = "refused", _NO_PLACE
            self._to_master.send(Kind.OFFER if is_crowded else Kind.KEEP, *place, enclosed=(connection.sock,))
        except OSError:  # no room for what is to be kept; or the master has fallen behind just now, or is gone
            self._turn_away(connection, *reason)
            return
        if has_deadline:
            self._shared.bell.ring()
        if not is_crowded:
            self._put_back(connection)

    def _turn_away(self, connection: Connection, counter: str, reason: str) -> None:
        """End a new connection that cannot be handed over. The next one has its place, of which nobody was told."""
        self.row.increment("connections", counter)
        log.warning(reason, connection.client)
        self._table.end(connection.number)
        connection.close()
        self._descriptors.forget(connection.number)
        self._unused.append((connection.number, connection.serial))

    def _await_place(self, connection: Connection, *, is_crowded: bool) -> tuple[int, int] | None:
        """Return a place for a new connection; None when there will be none, or the connection has ended.

        As a rule there is one. While the master is away, or behind, the connection is served here, for as long as
        that keeps nobody waiting, or while a new program is about to take the master's place; but not where the
        master may yet refuse it (*is_crowded*).
        """
        begun = monotonic()
        while not (place := self._take_place()):
            now = monotonic()
            if now - begun > _PATIENCE:
                self._before_long_job()
                if orphan.is_orphan(self._shared.lifeline.fd):
                    return None
            if now > max(begun + _LONG_PATIENCE, self._board.back_by) and self._is_needed():
                return None
            if connection.has_ended:
                return None
            moment = _MOMENT if self._on_duty else _LONG_MOMENT
            is_silent = not is_ready(connection.sock.fileno(), milliseconds=moment)
            if not is_silent and (is_crowded or connection.stage or not self._serve(connection)):
                time.sleep(_BREATH)
        return place

    def _take_place(self) -> tuple[int, int] | None:
        """Return a place that is reserved, if there is one and there is room to tell the master what is in it."""
        if not is_ready(self._to_master.fileno(), select.POLLOUT):
            return None
        return self._unused.pop() if self._unused else self.row.take_reservation()

    def _is_needed(self) -> bool:
        """Whether this worker is to leave, or the last that could serve others."""
        return self._must_leave() or not self._board.count(State.IDLE, State.RESERVE)

    # The rest.

    def _leave_to_fork(self) -> None:
        """In a process that the code of a map has forked: keep nothing of clients.

        It may live longer than this worker, and a connection ends with its last descriptor. If it returns from the
        map's code it ends, for it has nothing to serve with.
        """
        if self._is_fork:
            return  # a fork of a fork, which has files of its own by now
        self._is_fork = True
        if hasattr(self, "_descriptors"):
            self._descriptors.leave_to_fork()
        for sock in (self._newcomer, *(listener.sock for listener in self._listeners.values())):
            if sock and sock.fileno() >= 0:
                os.close(sock.detach())
        self._table.leave_to_fork()

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if orphan.is_orphan(self._shared.lifeline.fd):
            self._leaving = True
            if self.row.job_started:
                orphan.end_soon(self._listeners.values())
            return
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
