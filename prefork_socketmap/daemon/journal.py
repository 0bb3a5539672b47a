"""The journal: what systemd makes of stderr, and how a line tells it its priority (sd-daemon(3), systemd.exec(5)).

The journal adds the name and the time of its own. So where it reads, a line begins with its priority and neither.
"""

from __future__ import annotations

import contextlib
import os
import sys
import syslog


def reads(descriptor: int = 2) -> bool:
    """Whether what is written to *descriptor* goes to the journal: systemd says which stream is its own."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    with contextlib.suppress(OSError):
        found = os.fstat(descriptor)
        return (device, inode) == (str(found.st_dev), str(found.st_ino))
    return False


def complain(problem: str, code: int = os.EX_SOFTWARE, priority: int = syslog.LOG_ERR) -> int:
    """Write *problem* to stderr, with the program's name, or for the journal with its *priority*; return *code*."""
    if reads():
        problem = "\n".join(f"<{priority}>{line}" for line in problem.splitlines())
    else:
        problem = f"prefork-socketmap: {problem}"
    print(problem, file=sys.stderr, flush=True)
    return code
