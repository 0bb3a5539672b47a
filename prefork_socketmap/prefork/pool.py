"""The pool: the worker processes as the master sees them. It forks, signals and reaps; the master decides."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic

from prefork_socketmap.prefork.generation import Generation
from prefork_socketmap.prefork.parking import Inheritance, Keeper
from prefork_socketmap.prefork.scoreboard import Row, State
from prefork_socketmap.prefork.shared import Shared
from prefork_socketmap.prefork.signals import Signals
from prefork_socketmap.prefork.takeover import ChildState
from prefork_socketmap.prefork.worker import LEAVE, Worker, flush_output, leave_process


@dataclass(eq=False)
class Child:
    """A worker process, and what the master knows of it. Times are CLOCK_MONOTONIC seconds, 0.0: never."""

    pid: int
    row: Row
    generation: Generation
    born: float
    ready: bool = False
    leaving: bool = False
    killed: bool = False
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

    def retire(self) -> None:
        """Tell the worker, once, to finish what it does and leave."""
        if not self.leaving:
            self.leaving = True
            self.send(LEAVE)


class Pool:
    """All workers, by their process id."""

    def __init__(self, shared: Shared, keeper: Keeper, signals: Signals, in_child: Callable[[], None]) -> None:
        """*in_child* closes, in a new worker, what is the master's alone."""
        self.children: dict[int, Child] = {}
        self._shared = shared
        self._keeper = keeper
        self._signals = signals
        self._in_child = in_child
        self._worker: Worker | None = None

    def state(self) -> list[ChildState]:
        """Return what another program needs to go on with these workers."""
        return [
            ChildState(child.pid, child.row.slot, child.born, child.ready, child.leaving)
            for child in self.children.values()
        ]

    def resume(self, states: Iterable[ChildState], generation: Generation) -> None:
        """Go on with workers of the program that was here before, as workers of *generation*."""
        for state in states:
            row = Row(self._shared.board, state.slot)
            child = Child(state.pid, row, generation, state.born)
            child.ready, child.leaving = state.ready, state.leaving
            self.children[child.pid] = child

    def of(self, generation: Generation | None) -> list[Child]:
        """Return the workers of *generation* that have not been told to leave."""
        return [child for child in self.children.values() if child.generation is generation and not child.leaving]

    def fork(self, generation: Generation, number: int = 1) -> None:
        """Start workers. Raises OSError when the system does not let us start so many."""
        rows: list[Row] = []
        try:
            while len(rows) < number:
                rows.append(self._shared.board.claim(generation.number))
        finally:
            self._fork(generation, rows)  # those that there is room for

    def _fork(self, generation: Generation, rows: Sequence[Row]) -> None:
        worker = self._worker_of(generation)
        parked = self._keeper.inheritance()
        pids: list[int] = []
        flush_output()
        try:
            # A signal that arrives before the child has handlers of its own must meet neither the master's nor none.
            with self._signals.blocked():
                # Nothing else in this loop: what is written between two forks is one more copy for the child before.
                for row in rows:
                    pid = os.fork()
                    if pid == 0:
                        self._be_child(worker, row, parked)
                    pids.append(pid)
        finally:
            self._register(generation, rows, pids)

    def _register(self, generation: Generation, rows: Sequence[Row], pids: Sequence[int]) -> None:
        for row, pid in zip(rows, pids, strict=False):
            row.pid = pid
            self.children[pid] = Child(pid, row, generation, monotonic())
        for row in rows[len(pids) :]:
            row.end()
        self._shared.board.workers_spawned += len(pids)

    def _worker_of(self, generation: Generation) -> Worker:
        if not self._worker or self._worker.generation is not generation:
            self._worker = Worker(generation, self._shared, self._signals)
        return self._worker

    def _be_child(self, worker: Worker, row: Row, parked: Inheritance) -> None:
        status = 1
        try:
            self._in_child()
            status = worker.live(row, parked)
        finally:
            leave_process(status)

    def reap(self, *, spare: int = 0) -> list[tuple[Child, int]]:
        """Return the workers that have ended, with their exit statuses (negative: the signal that killed them).

        *spare* is the pid of a child that is no worker.
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
                del self.children[pid]
                child.row.end()
                ended.append((child, os.waitstatus_to_exitcode(status)))
        if os.getpid() == 1:
            _reap_strangers({*self.children, spare})
        return ended

    def kill(self) -> None:
        """Kill all workers at once."""
        for child in self.children.values():
            child.killed = True
            child.send(signal.SIGKILL)


def _reap_strangers(own: set[int]) -> None:
    """As process 1 (in a container) wait for orphans, which are handed to us."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and found.si_pid not in own:
            os.waitpid(found.si_pid, 0)
