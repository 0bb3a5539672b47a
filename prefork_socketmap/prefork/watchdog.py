"""The watchdog: nothing that a worker does may take forever.

A job past its limit is interrupted; a worker that does not react is killed, as is one that does not get ready, or
that somebody stopped (SIGSTOP) and nobody continued.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterable

from prefork_socketmap.prefork.pool import Child
from prefork_socketmap.prefork.scoreboard import Scoreboard
from prefork_socketmap.prefork.worker import INTERRUPT_JOB

log = logging.getLogger("prefork_socketmap.master")

START_LIMIT = 60.0
"""How long a worker may take to get ready, in seconds."""
_GRACE = 2.0
"""How long an interrupted job has to end."""


def check(children: Iterable[Child], board: Scoreboard, job_limit: float, now: float) -> float:
    """Interrupt and kill what is past its limit; *board* counts it. Return when to check again.

    *job_limit* is in seconds, 0: none. A job that begins after this check cannot be late before now + job_limit:
    there is no need to look more often.
    """
    limit = job_limit or float("inf")
    return min([now + limit, *(_check_child(child, board, limit, now) for child in children)])


def _check_child(child: Child, board: Scoreboard, limit: float, now: float) -> float:
    if child.killed:
        return float("inf")
    started = child.row.job_started
    if not child.ready:
        due, problem = child.born + START_LIMIT, "has not become ready"
    elif child.stopped:
        due, problem = child.stopped + limit, "is stopped and nobody continues it"
    elif not started:
        return float("inf")
    elif child.interrupted == started:
        due, problem = started + limit + _GRACE, "does not react to the interruption of a lookup"
    else:
        return _check_job(child, started + limit, now)
    if now < due:
        return due
    log.error("worker %d %s: killed", child.pid, problem)
    board.workers_killed += 1
    child.killed = True
    child.send(signal.SIGKILL)
    return float("inf")


def _check_job(child: Child, due: float, now: float) -> float:
    if now < due:
        return due
    log.warning("worker %d: a lookup takes too long and is interrupted", child.pid)
    child.interrupted = child.row.job_started
    child.send(INTERRUPT_JOB)
    return due + _GRACE
