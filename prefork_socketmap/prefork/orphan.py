"""What workers do when their master is gone, however it ended: finish the job, and see that nothing is left behind.

Who is idle learns it from the lifeline. The kernel tells those with a job by a signal, and gives the job a few
seconds. One that is stuck where no signal handler of Python runs is killed by a sibling that is idle. The listening
sockets are shut down at once: clients are refused, not left in a queue that nobody serves, and a new master can bind.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import time
from collections.abc import Iterable

from prefork_socketmap.prefork.listener import Listener
from prefork_socketmap.prefork.scoreboard import Scoreboard
from prefork_socketmap.prefork.shared import is_ready

log = logging.getLogger("prefork_socketmap.worker")

_GRACE = 3.0
"""How long a job may go on, in seconds."""
_PAUSE = 0.05
_PR_SET_PDEATHSIG = 1  # prctl(2)
_libc = ctypes.CDLL(None)


def ask_for_signal(number: int) -> None:
    """Have the kernel send this process *number* when its parent is gone. To be called after a change of user."""
    _libc.prctl(_PR_SET_PDEATHSIG, number)


def is_orphan(lifeline: int) -> bool:
    """Whether the master is gone."""
    return is_ready(lifeline)


def end_soon(listeners: Iterable[Listener]) -> None:
    """Stop listening, and give the job under way its last seconds."""
    for listener in listeners:
        listener.shut_down()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _GRACE)


def close_up(board: Scoreboard, listeners: Iterable[Listener]) -> None:
    """Stop listening, wait for the jobs of other workers, and kill those that are stuck."""
    signal.setitimer(signal.ITIMER_REAL, 0)  # those seconds were for a job
    log.error("the master is gone: worker %d leaves", os.getpid())
    for listener in listeners:
        listener.shut_down()
    deadline = time.monotonic() + _GRACE
    while others := _with_a_job(board):
        if time.monotonic() >= deadline:
            for pid in others:
                log.error("worker %d is stuck, and killed", pid)
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(_PAUSE)


def _with_a_job(board: Scoreboard) -> list[int]:
    """Return the pids of workers that are doing a job. What stands on the board is taken for a hint, no more."""
    return [row.pid for row in board.rows() if row.job_started and _is_sibling(row.pid)]


def _is_sibling(pid: int) -> bool:
    try:
        return 1 < pid < 1 << 31 and pid != os.getpid() and os.getpgid(pid) == os.getpgid(0)
    except OSError:
        return False
