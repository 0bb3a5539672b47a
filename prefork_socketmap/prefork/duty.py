"""Duty and reserve: which of a generation's idle workers wait for connections, and which sleep until they are called.

A woken process is cheap while its caches are warm and dear when they are not, so only about as many workers as there
are CPUs are *on duty* at the connection table; all others are in reserve. (Go's scheduler keeps as many Ps; an I/O
completion port has its concurrency value.) The place of a worker that is held up by a long job goes to one in
reserve. Who expects its job to be long calls a successor first; for one that is held up by surprise the master does,
who looks every few milliseconds while nobody waits at the table, and at no other time (see ``policy``).

The reserve waits at a set of its own, and is called by a semaphore: one waiter takes one call. The same kind of thing
*dismisses* idle workers, wherever they wait, and a *gong* tells all of a generation to leave. No code of a user can
take these, as it could a signal.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from dataclasses import dataclass

from prefork_socketmap.prefork.scoreboard import Row, Scoreboard, State
from prefork_socketmap.prefork.shared import give, is_ready, make_semaphore, take
from prefork_socketmap.prefork.table import ConnectionTable

_HELD_UP = 0.004  # seconds; less, and a machine that is busy makes every worker look like that
_ONE_CALL = select.EPOLLIN | select.EPOLLONESHOT
PLACES = max(len(os.sched_getaffinity(0)), 1)
"""So many workers are on duty."""


@dataclass(frozen=True)
class DutyState:
    """What the next program needs to go on: descriptors."""

    reserve: int
    calls: int
    dismissals: int
    gong: int


class Duty:
    """The places on duty, and the reserve, of one generation. Made by the master before it forks its workers."""

    def __init__(self, board: Scoreboard, lifeline: int) -> None:
        self._board = board
        self._reserve = select.epoll()
        self._calls, self._dismissals, self.gong = (make_semaphore() for _ in range(3))
        # A call wakes one worker. The others are rare, and are heard by all until they are read, or for ever.
        self._reserve.register(self._calls, _ONE_CALL)
        for fd in (self._dismissals, self.gong, lifeline):
            self._reserve.register(fd, select.EPOLLIN)

    @classmethod
    def resume(cls, board: Scoreboard, state: DutyState) -> Duty:
        """Go on with what the program that was here before has made."""
        duty = cls.__new__(cls)
        duty._board = board
        duty._reserve = select.epoll.fromfd(state.reserve)
        duty._calls, duty._dismissals, duty.gong = state.calls, state.dismissals, state.gong
        return duty

    def state(self) -> DutyState:
        """Return what the next program needs."""
        return DutyState(self._reserve.fileno(), self._calls, self._dismissals, self.gong)

    def open_at(self, table: ConnectionTable) -> None:
        """Let those that wait at *table* hear dismissals and the gong."""
        for fd in (self._dismissals, self.gong):
            table.add(fd, select.EPOLLIN)

    def close_at(self, table: ConnectionTable) -> None:
        """Undo that, and close this process's descriptors."""
        for fd in (self._dismissals, self.gong):
            table.discard(fd)
        self.leave()

    def leave(self) -> None:
        """Close this process's descriptors: it is no worker of this generation."""
        self._reserve.close()
        for fd in (self._calls, self._dismissals, self.gong):
            os.close(fd)

    def free_places(self, now: float) -> int:
        """Return how many places on duty are free."""
        board = self._board
        states = bytes(board.states[: board.slots])
        free = PLACES - states.count(State.IDLE)
        if free > 0:
            serving = (slot for slot, state in enumerate(states) if state == State.SERVING)
            free -= sum(not is_held_up(Row(board, slot), now) for slot in serving)
        return max(free, 0)

    def call(self, number: int = 1) -> bool:
        """Call so many workers from the reserve to duty, as far as there are any; return whether there is one."""
        called = min(number, self._board.count(State.RESERVE))
        if called:
            give(self._calls, called)
        return called > 0

    def dismiss(self, number: int) -> None:
        """Let so many idle workers leave."""
        give(self._dismissals, number)

    def is_dismissal(self, fd: int) -> bool:
        """Whether *fd*, which was heard on duty, tells the one who hears it to leave."""
        return fd == self.gong or (fd == self._dismissals and take(fd))

    def wait_in_reserve(self, defers: Callable[[int], bool] = lambda _number: False) -> bool:
        """Wait until there is something to do; return whether it is duty. Otherwise it is time to leave.

        *defers* tells, from the number of those in reserve, whether to leave a call to another one.
        """
        while True:
            heard = {fd for fd, _ in self._reserve.poll()}
            if self._calls in heard:
                called = take(self._calls)
                self.listen_for_calls()  # the next one may be there already
                if called and not defers(self._board.count(State.RESERVE)):
                    return True
                if called:
                    give(self._calls)  # this one comes after all others now
            if self._dismissals in heard and take(self._dismissals):
                return False
            if heard - {self._calls, self._dismissals}:  # else somebody was faster
                return False  # the gong, or the end of the master

    def listen_for_calls(self) -> None:
        """Let the reserve hear calls again: one has woken a worker, which may have died over it."""
        self._reserve.modify(self._calls, _ONE_CALL)

    def is_meddled_with(self) -> bool:
        """Whether all workers of the generation, which serves, have been told to leave."""
        return is_ready(self.gong)

    def recall_dismissals(self, most: int) -> bool:
        """Take back what nobody has heard yet, up to *most*; return whether that was all."""
        return not all(take(self._dismissals) for _ in range(most + 1))

    def retire(self) -> None:
        """Tell all workers of the generation, now and for good, to leave."""
        give(self.gong, 1)


def is_held_up(row: Row, now: float, seconds: float = _HELD_UP) -> bool:
    """Whether a worker that is on duty has been doing one job for so long: its place is free."""
    return 0.0 < row.job_started < now - seconds
