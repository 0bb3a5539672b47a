"""The pool: the worker processes as the master sees them. It forks, signals and reaps; the master decides."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from prefork_socketmap.prefork.channel import Channel
from prefork_socketmap.prefork.generation import Generation
from prefork_socketmap.prefork.parking import Keeper, Lot
from prefork_socketmap.prefork.scoreboard import Row, Scoreboard, State
from prefork_socketmap.prefork.worker import LEAVE, Surroundings, flush_output, leave_process, live


@dataclass(eq=False)
class Child:
    """A worker process, and what the master knows of it. Times are CLOCK_MONOTONIC seconds, 0.0: never."""

    pid: int
    row: Row
    generation: Generation
    answers: Channel
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
        self.answers.close()

    def retire(self) -> None:
        """Tell the worker, once, to finish what it does and leave."""
        if not self.leaving:
            self.leaving = True
            self.send(LEAVE)


class Pool:
    """All workers, by their process id."""

    def __init__(
        self,
        board: Scoreboard,
        inbox: Channel,
        lot: Lot,
        keeper: Keeper,
        lifeline: int,
        in_child: Callable[[], None],
    ) -> None:
        """*inbox* is the workers' end, *lifeline* a descriptor that ends with the master.

        *in_child* closes, in a new worker, what is the master's alone.
        """
        self.children: dict[int, Child] = {}
        self._board = board
        self._inbox = inbox
        self._lot = lot
        self._keeper = keeper
        self._lifeline = lifeline
        self._in_child = in_child

    def of(self, generation: Generation | None) -> list[Child]:
        """Return the workers of *generation* that have not been told to leave."""
        return [child for child in self.children.values() if child.generation is generation and not child.leaving]

    def fork(self, generation: Generation) -> Child:
        """Start a worker. Raises OSError when the system does not let us."""
        row = self._board.claim(generation.number)
        answers, to_worker = Channel.pair()
        flush_output()
        # A signal that arrives between the fork and the child's own handlers must meet neither the master's nor none.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                to_worker.close()
                self._be_child(generation, row, answers)
        except OSError:
            row.end()
            to_worker.close()
            raise
        finally:
            answers.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        row.pid = pid
        child = Child(pid, row, generation, to_worker, monotonic())
        self.children[pid] = child
        return child

    def _be_child(self, generation: Generation, row: Row, answers: Channel) -> None:
        status = 1
        try:
            self._in_child()
            for sibling in self.children.values():
                sibling.answers.close()
            plan = generation.plan
            around = Surroundings(
                title=plan.title,
                generation=generation.number,
                listeners=generation.listeners,
                lot=self._lot,
                lifeline=self._lifeline,
                inbox=self._inbox,
                answers=answers,
                parked=self._keeper.inheritance(),
                board=self._board,
                row=row,
                limits=plan.limits,
                start=plan.start,
                allow=plan.allow,
            )
            status = live(around)
        finally:
            leave_process(status)

    def reap(self) -> list[tuple[Child, int]]:
        """Return the workers that have ended, with their exit statuses (negative: the signal that killed them)."""
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
                child.answers.close()
                ended.append((child, os.waitstatus_to_exitcode(status)))
        if os.getpid() == 1:
            _reap_strangers(set(self.children))
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
