"""The watchdog: nothing that a worker does may take forever.

A job past its limit is interrupted; a worker that does not react is killed, as is one that does not get ready, that
does not leave when it is told to, or that somebody stopped (SIGSTOP) and nobody continued.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterable, Iterator

from prefork_socketmap.prefork.pool import Child
from prefork_socketmap.prefork.scoreboard import Scoreboard

log = logging.getLogger("prefork_socketmap.master")

START_LIMIT = 60.0
"""How long a worker may take to get ready, in seconds."""
GRACE = 2.0
"""How long an interrupted job has to end, and a worker to leave after that."""


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
    if child.row.is_damaged:
        log.error("worker %d is killed: what it does cannot be what its row on the scoreboard says", child.pid)
        board.increment("workers", "killed")
        child.kill()
        return float("inf")
    started = child.row.job_started  # once: the worker goes on meanwhile
    due, problem = min(_limits_of(child, started, limit))
    if now >= due:
        log.error("worker %d %s: killed", child.pid, problem)
        board.increment("workers", "killed")
        child.kill()
        return float("inf")
    if not started or child.interrupted == started:
        return due
    return min(due, _check_job(child, started, limit, now))


def _limits_of(child: Child, started: float, limit: float) -> Iterator[tuple[float, str]]:
    """Yield until when the worker may go on as it does, and what it has failed to do then."""
    if not child.ready:
        yield child.born + START_LIMIT, "has not become ready"
    if child.leaves_by:
        yield child.leaves_by, "has not left, as it was told to"
    if child.stopped:
        yield child.stopped + limit, "is stopped and nobody continues it"
    elif started and child.interrupted == started:
        yield started + limit + GRACE, "does not react to the interruption of a lookup"
    yield float("inf"), ""


def _check_job(child: Child, started: float, limit: float, now: float) -> float:
    due = started + limit
    if now < due or child.stopped:
        return due if now < due else float("inf")
    log.warning("worker %d: a lookup takes too long and is interrupted", child.pid)
    child.interrupted = started
    child.send(signal.SIGUSR2)
    return due + GRACE
