"""The staff: how many workers there are, and how many of the idle ones wait at the front.

One idle worker waits at the front, for the lot; the others are in reserve. As long as lookups take microseconds one
process answers them all, and its caches stay warm: with two thousand clients that ask once a second a lookup costs
a third of what it costs when five take turns. A worker that is going to be occupied for longer calls a successor to
the front; for one that is held up by surprise the master does so, who looks every few milliseconds while nobody is
at the front. Whoever has been waiting at such a look gets a worker from the reserve or, when that is empty, a new
one.
"""

from __future__ import annotations

import logging
from time import monotonic

from prefork_socketmap.prefork.generation import Generation
from prefork_socketmap.prefork.parking import Lot
from prefork_socketmap.prefork.pool import Pool
from prefork_socketmap.prefork.scoreboard import Scoreboard, State

log = logging.getLogger("prefork_socketmap.master")

_NEVER = float("inf")
_LOOK = 0.005  # how often to look while nobody is at the front: how long a client may wait behind a slow lookup
_SPARE_CHECK = 1.0  # how long there may be fewer than min_spare idle workers, if nobody has to wait
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # between the attempts to start a worker that cannot start


class Staff:
    """Keeps the workers of ``generation``, when there is one, as many as its limits say. Times are monotonic seconds.

    The methods that take *now* do what is due and return when they want to be called again.
    """

    def __init__(self, board: Scoreboard, pool: Pool, lot: Lot) -> None:
        self.generation: Generation | None = None
        self._board = board
        self._pool = pool
        self._lot = lot
        self._pause = _FIRST_PAUSE
        self._paused_until = 0.0

    def replenish(self, now: float) -> float:
        """Start what is missing: enough for min_spare idle workers, within process_limit."""
        if not self.generation:
            return _NEVER
        if now < self._paused_until:
            return self._paused_until
        limits = self.generation.plan.limits
        workers = self._pool.of(self.generation)
        room = limits.process_limit - len(workers)
        idle = sum(child.row.state in (State.IDLE, State.RESERVE, State.STARTING) for child in workers)
        # At the limit nobody need tell us that more are wanted.
        self._board.knows_shortage = room <= 0
        missing = min(limits.min_spare - idle, room)
        if missing > 0:
            try:
                self._pool.fork(self.generation, missing)
            except OSError as error:
                log.error("cannot fork: %s", error)
                return self.pause()
        return _NEVER

    def pause(self) -> float:
        """Start no worker for a while, each time longer: never a tight loop of failing starts. Return its end."""
        now = monotonic()
        if now >= self._paused_until:  # else this failure belongs to the same attempt: workers are started together
            self._paused_until = now + self._pause
            self._board.workers_throttled += 1
            log.warning("no worker is started for %g s", self._pause)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return self._paused_until

    def end_pause(self) -> None:
        """Forget past failures: a worker has become ready."""
        self._pause = _FIRST_PAUSE
        self._paused_until = 0.0

    def shrink(self, now: float) -> float:
        """Let workers leave that have been idle for max_idle, beyond min_spare."""
        limits = self.generation.plan.limits if self.generation else None
        if not limits or not limits.max_idle:
            return _NEVER
        idle = [child for child in self._pool.of(self.generation) if child.row.state in (State.IDLE, State.RESERVE)]
        idle.sort(key=lambda child: child.row.since)
        for child in idle[: max(len(idle) - limits.min_spare, 0)]:
            if now < child.row.since + limits.max_idle:
                return child.row.since + limits.max_idle
            child.retire()
        return now + limits.max_idle

    def hear_of_shortage(self) -> float:
        """Hear from a worker that fewer than min_spare are idle. Return when to replenish, if that is still so."""
        self._board.knows_shortage = True
        return monotonic() + _SPARE_CHECK

    def hear_of_empty_front(self) -> float:
        """Hear from a worker that it leaves nobody at the front. Return when to look after the clients."""
        self._board.is_watched = True
        return monotonic() + _LOOK

    def look(self, now: float) -> float:
        """See to it that nobody waits while the front is empty."""
        if not self._board.is_watched:
            return _NEVER
        self._board.is_watched = False
        # In this order: a worker looks at the flag after it has left the front.
        if self._board.count(State.IDLE):
            return _NEVER
        self._board.is_watched = True
        if self._lot.has_work():
            if self._board.count(State.RESERVE):
                self._lot.call_reserve()
            else:
                self.replenish(now)
        return now + _LOOK
