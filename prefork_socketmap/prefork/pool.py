"""The pool: the worker processes as the master sees them. It forks, signals and reaps; the master decides."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic

from prefork_socketmap.prefork.connections import Connections
from prefork_socketmap.prefork.generation import Generation
from prefork_socketmap.prefork.scoreboard import Row, State
from prefork_socketmap.prefork.shared import Shared
from prefork_socketmap.prefork.signals import Signals
from prefork_socketmap.prefork.upgrade import ChildState
from prefork_socketmap.prefork.worker import Worker, flush_output, leave_process


@dataclass(eq=False)
class Child:
    """A worker process, and what the master knows of it. Times are CLOCK_MONOTONIC seconds, 0.0: never."""

    pid: int
    row: Row
    generation: Generation
    born: float
    ready: bool = False
    leaves_by: float = 0.0
    """Until when it has to have left; 0.0: it may stay."""
    failed: bool = False
    """Whether it has said that it cannot start: then its end is no surprise."""
    killed: bool = False
    punished: bool = False
    """Whether it was killed for what it sent: nothing that it sends is heard any more."""
    inherited: int = 0
    """It has had all connections with arrival numbers up to this one from the beginning,"""
    horizon: int = 0
    """and has been given those up to this one."""
    interrupted: float = 0.0
    stopped: float = 0.0
    stopped_in: State = State.FREE

    def send(self, number: int) -> None:
        """Send a signal. The pid is ours for as long as the child has not been reaped."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def note_stop(self) -> None:
        """Note that somebody has stopped it: it may say that it is idle, but nobody can count on it."""
        self.stopped = monotonic()
        self.stopped_in = self.row.state
        self.row.set_state(State.STOPPED)

    def note_continuation(self) -> None:
        """Note that it goes on where it was stopped, unless it has gone further already."""
        self.stopped = 0.0
        if self.row.state is State.STOPPED:
            self.row.set_state(self.stopped_in)

    def wait(self) -> None:
        """Wait for its end."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def kill(self) -> None:
        """Kill it at once. Its end is no surprise then."""
        self.killed = True
        self.send(signal.SIGKILL)


class Pool:
    """All workers, by their process id."""

    def __init__(
        self, shared: Shared, connections: Connections, signals: Signals, in_child: Callable[[Generation], None]
    ) -> None:
        """*in_child* closes, in a new worker, what is the master's alone, or another generation's."""
        self.children: dict[int, Child] = {}
        self._shared = shared
        self._connections = connections
        self._signals = signals
        self._in_child = in_child
        self._worker: Worker | None = None

    def state(self) -> list[ChildState]:
        """Return what another program needs to go on with these workers."""
        return [
            ChildState(
                child.pid,
                child.row.slot,
                child.born,
                child.ready,
                child.leaves_by,
                child.inherited,
                child.horizon,
            )
            for child in self.children.values()
        ]

    def resume(self, states: Iterable[ChildState], generation: Generation) -> None:
        """Go on with workers of the program that was here before, as workers of *generation*."""
        for state in states:
            self._shared.board.take(state.slot)
            row = Row(self._shared.board, state.slot)
            child = Child(state.pid, row, generation, state.born)
            child.ready, child.leaves_by = state.ready, state.leaves_by
            child.inherited, child.horizon = state.inherited, state.horizon
            self._connections.reserve(row)
            self.children[child.pid] = child

    def of(self, generation: Generation | None) -> list[Child]:
        """Return the workers of *generation* that have not been told to leave."""
        return [child for child in self.children.values() if child.generation is generation and not child.leaves_by]

    def fork(self, generation: Generation, number: int = 1) -> None:
        """Start workers. Raises OSError when the system does not let us start so many."""
        rows: list[Row] = []
        try:
            while len(rows) < number:
                rows.append(self._shared.board.claim(generation.number))
                self._connections.reserve(rows[-1])  # before it lives: it may serve before we go on
        finally:
            self._fork(generation, rows)  # those that there is room for

    def _fork(self, generation: Generation, rows: Sequence[Row]) -> None:
        worker = self._worker_of(generation)
        pids: list[int] = []
        flush_output()
        try:
            # A signal that arrives before the child has handlers of its own must meet neither the master's nor none.
            with self._signals.blocked():
                # Nothing else in this loop: what is written between two forks is one more copy for the child before.
                for row in rows:
                    pid = os.fork()
                    if pid == 0:
                        self._be_child(worker, row)
                    pids.append(pid)
        finally:
            self._register(generation, rows, pids)

    def _register(self, generation: Generation, rows: Sequence[Row], pids: Sequence[int]) -> None:
        newest = self._connections.newest
        for row, pid in zip(rows, pids, strict=False):
            row.pid = pid
            self.children[pid] = Child(pid, row, generation, monotonic(), inherited=newest, horizon=newest)
        for row in rows[len(pids) :]:
            self._connections.release_reservations(row)
            row.end()
        for _ in pids:
            self._shared.board.increment("workers", "spawned")

    def _worker_of(self, generation: Generation) -> Worker:
        if not self._worker or self._worker.generation is not generation:
            self._worker = Worker(generation, self._shared, self._signals)
        return self._worker

    def _be_child(self, worker: Worker, row: Row) -> None:
        status = 1
        try:
            self._in_child(worker.generation)
            status = worker.live(row, self._connections.inheritance(), self._connections.newest)
        finally:
            leave_process(status)

    def reap(self, *, spare: int = 0) -> list[tuple[Child, int]]:
        """Return the workers that have ended, with their exit statuses (negative: the signal that killed them).

        They are still among the children, and their rows as they left them, until ``forget``. *spare* is the pid of a
        child that is no worker.
        """
        # Not waitpid(-1): in the library the process may have other children, which are none of our business.
        ended = []
        for child in list(self.children.values()):
            pid, status = os.waitpid(child.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if not pid:
                continue
            if os.WIFSTOPPED(status):
                child.note_stop()
            elif os.WIFCONTINUED(status):
                child.note_continuation()
            else:
                ended.append((child, os.waitstatus_to_exitcode(status)))
        if os.getpid() == 1:
            _reap_strangers({*self.children, spare})
        return ended

    def forget(self, child: Child) -> None:
        """Free the place of a worker that has ended."""
        del self.children[child.pid]
        child.row.end()

    def retire(self, generation: Generation, number: int, within: float) -> None:
        """Tell the workers of *generation*, and of all up to *number*, to leave, within so many seconds."""
        board = self._shared.board
        board.retired = max(board.retired, number)
        generation.duty.retire()
        for child in self.children.values():
            if child.generation is generation:
                child.leaves_by = child.leaves_by or monotonic() + within

    def renew(self) -> None:
        """Let workers that are forked from now on use what the master shares with them by now."""
        self._worker = None

    def kill(self) -> None:
        """Kill all workers at once."""
        for child in self.children.values():
            child.kill()


def _reap_strangers(own: set[int]) -> None:
    """As process 1 (in a container) wait for orphans, which are handed to us."""
    with contextlib.suppress(ChildProcessError, AttributeError):  # PyPy has no way to ask without waiting for ours
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and found.si_pid not in own:
            os.waitpid(found.si_pid, 0)
