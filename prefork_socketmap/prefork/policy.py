"""The process policy: how many workers there are, and that somebody is on duty.

The number follows jobs, not clients: ``min_spare`` workers are ready beside those that are held by a long job, up to
``process_limit``. What jobs take microseconds is no reason for more workers than there are places on duty.

While nobody waits on duty the master looks every few milliseconds: whoever is held up there by surprise loses its
place to one from the reserve, or to a new one. A worker rings when it leaves nobody waiting; else nothing ticks.
"""

from __future__ import annotations

import logging
from collections import Counter
from time import monotonic

from prefork_socketmap.prefork.duty import Duty, is_held_up
from prefork_socketmap.prefork.generation import Generation
from prefork_socketmap.prefork.pool import Child, Pool
from prefork_socketmap.prefork.scoreboard import Scoreboard, State
from prefork_socketmap.prefork.table import ConnectionTable

log = logging.getLogger("prefork_socketmap.master")

_NEVER = float("inf")
LOOK = 0.002
"""How often to look while nobody waits on duty: how long a client may wait behind a slow job, in seconds."""
_LOOK_IN_VAIN = 0.05  # the same, when nothing can be done about it
# Seconds of a job after which its worker is no spare one. To start another takes longer than to call one to duty: so
# it takes more to be believed, since on a busy machine every worker looks held up now and then.
_HELD = 0.02
_DISMISSAL_TIME = 1.0  # how long workers that are dismissed may take to leave, before others are
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # between the attempts to start a worker that cannot start
_FREE_KILLS = 100
"""So many workers may be killed before they are ready, one after the other, and it is no failure to start."""
_SPARE = (State.IDLE, State.RESERVE, State.STARTING)


class ProcessPolicy:
    """Keeps the workers of ``generation``, when there is one, as many as its limits say. Times are monotonic seconds.

    The methods that take *now* do what is due and return when they want to be called again.
    """

    def __init__(self, board: Scoreboard, pool: Pool, table: ConnectionTable) -> None:
        self.generation: Generation | None = None
        self._board = board
        self._pool = pool
        self._table = table
        self._pause = _FIRST_PAUSE
        self._paused_until = 0.0
        self._dismissed = 0.0
        self._is_exhausted = False
        self._kills = 0

    def room(self, generation: Generation) -> int:
        """Return how many more workers of *generation* there may be.

        All generations together stay within process_limit, and min_spare beyond it while former ones leave.
        """
        plans = [each.plan for each in (generation, self.generation) if each]
        # A change may lower the limits: those that it finds do not stand in its way.
        most = max(plan.limits.process_limit + plan.limits.min_spare for plan in plans)
        own = generation.plan.limits.process_limit - len(self._pool.of(generation))
        return min(own, most - len(self._pool.children))

    def replenish(self, now: float) -> float:
        """Start what is missing: enough for min_spare idle workers, within process_limit."""
        generation = self.generation
        if not generation:
            return _NEVER
        if now < self._paused_until:
            return self._paused_until
        spare = sum(_is_spare(child, now) for child in self._pool.of(generation))
        return self._start(generation, generation.plan.limits.min_spare - spare)

    def _start(self, generation: Generation, missing: int) -> float:
        room = self.room(generation)
        self._board.exhausted = room <= 0
        if min(missing, room) > 0:
            try:
                self._pool.fork(generation, min(missing, room))
            except OSError as error:
                log.error("cannot fork: %s", error)
                return self.pause()
        return _NEVER

    def pause(self) -> float:
        """Start no worker for a while, each time longer: never a tight loop of failing starts. Return its end."""
        now = monotonic()
        if now >= self._paused_until:  # else this failure belongs to the same attempt: workers are started together
            self._paused_until = now + self._pause
            self._board.increment("workers", "throttled")
            log.warning("no worker is started for %g s", self._pause)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return self._paused_until

    def excuse_kill(self) -> None:
        """Hear that somebody has killed a worker before it was ready: not its fault, unless nothing else happens."""
        self._kills += 1
        if self._kills > _FREE_KILLS:
            self.pause()

    def end_pause(self) -> None:
        """Forget past failures: a worker has become ready."""
        self._kills = 0
        self._pause = _FIRST_PAUSE
        self._paused_until = 0.0

    def shrink(self, now: float) -> float:
        """Let workers leave that have been idle for max_idle, beyond min_spare."""
        limits = self.generation.plan.limits if self.generation else None
        if not (self.generation and limits and limits.max_idle):
            return _NEVER
        if now < self._dismissed + _DISMISSAL_TIME:
            return self._dismissed + _DISMISSAL_TIME
        workers = self._pool.of(self.generation)
        spare = sum(_is_spare(child, now) for child in workers)
        idle = sorted(child.row.since for child in workers if child.row.state in (State.IDLE, State.RESERVE))
        beyond = idle[: max(spare - limits.min_spare, 0)]
        due = sum(since + limits.max_idle <= now for since in beyond)
        if due:
            self.generation.duty.dismiss(due)
            self._dismissed = now
        return min([now + limits.max_idle, *(since + limits.max_idle for since in beyond[due:])])

    # Duty.

    def lose_worker(self) -> None:
        """See to it that nobody is missed who has died."""
        if self.generation:
            self.generation.duty.listen_for_calls()

    def is_meddled_with(self, now: float) -> bool:
        """Whether workers are told to leave by somebody else."""
        if not self.generation:
            return False
        duty = self.generation.duty
        is_over = now >= self._dismissed + _DISMISSAL_TIME
        return duty.is_meddled_with() or (is_over and not duty.recall_dismissals(len(self._pool.children)))

    def renew_duty(self, lifeline: int) -> None:
        """Let nothing that workers have heard of concern those that are to come."""
        if self.generation:
            self.generation.duty.close_at(self._table)
            self.generation.duty = Duty(self._board, lifeline)
            self.generation.duty.open_at(self._table)

    def fill_places(self, now: float) -> None:
        """See to it that all places on duty are taken, as far as there are workers."""
        if self.generation:
            duty = self.generation.duty
            duty.call(duty.free_places(now))

    def watch(self, now: float) -> float:
        """See to it that nobody waits while nobody is waiting on duty."""
        board, generation = self._board, self.generation
        if not (board.watched and generation):
            return _NEVER
        self.replenish(now)
        board.watched = 0
        # In this order: a worker looks at the flag after it has stopped waiting.
        if board.count(State.IDLE):
            self._is_exhausted = False
            return _NEVER
        board.watched = 1
        free = generation.duty.free_places(now)
        if not free or generation.duty.call(free):
            return now + LOOK
        if not self._table.has_work() or board.count(State.STARTING):
            return now + LOOK
        if now >= self._paused_until:
            self._start(generation, 1)  # there are fewer workers than places, and clients wait
        if not board.exhausted:
            return now + LOOK
        self._tell_exhaustion(generation)
        return now + _LOOK_IN_VAIN

    def _tell_exhaustion(self, generation: Generation) -> None:
        """Tell, once, that clients wait for workers, and what holds those."""
        if self._is_exhausted:
            return
        self._is_exhausted = True
        self._board.increment("workers", "exhausted")
        held_by = Counter(
            self._board.name(child.row.job_name) for child in self._pool.children.values() if child.row.job_started
        )
        log.warning(
            "lookups wait: process_limit = %d is reached; workers are held by %s",
            generation.plan.limits.process_limit,
            ", ".join(f"[{name}] ({number})" for name, number in held_by.most_common(3)) or "former generations",
        )


def _is_spare(child: Child, now: float) -> bool:
    """Whether a worker is free, or as good as: not held by a long job."""
    state = child.row.state
    if state is State.BUSY:  # for a moment without a job, too: while it looks whether it may stay on duty
        return not child.row.job_started
    return state in _SPARE or (state is State.SERVING and not is_held_up(child.row, now, _HELD))
